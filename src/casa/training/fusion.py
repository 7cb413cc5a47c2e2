"""Stage `fusion`: text learns to look. CASA layers, projector and text model together, on answers only.

Legend: B rows, T tokens per row, n pictures, N image tokens of all pictures, C the tower's output width
    input_ids, position_ids, labels int64 (B, T); image_positions int64 (n, 2); image_features (N, C)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa.models import CasaForConditionalGeneration, adapt
from casa.training.checkpoints import mark_done
from casa.training.conversation import Sample, Writer
from casa.training.loop import Loop, Monitor, Report
from casa.training.packing import pack
from casa.training.pool import Draws, Pool, Seen, look
from casa.training.prefetch import prefetch
from casa.training.recipe import Recipe
from casa.training.sources import Sources


def train_fusion(
    recipe: Recipe,
    sources: Sources,
    text: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tower: Qwen2_5_VisionTransformerPretrainedModel,
    folder: Path,
    report: Report | None = None,
    monitor: Monitor | None = None,
) -> CasaForConditionalGeneration:
    """Fuses and trains; the tower is kept as it is. Writes the model to `folder` when done."""
    stage = recipe.fusion
    torch.manual_seed(recipe.seed + 3)
    tower.requires_grad_(False).eval()
    model = adapt(text, fusion=stage.fusion, vision=tower)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("vision.")}
    loop = Loop("fusion", folder, trained, stage.optimisation, report)
    if monitor is not None:
        loop.watch = lambda step: monitor("fusion", step, model)
    start = loop.resume()
    writer = Writer(tokenizer)

    def batches() -> Iterator[tuple[list[Seen], list[Sample]]]:
        pool = Pool(stage.pool_draws)
        # draw number n joins the pool for step n - prefill; a resumed run draws again what the pool still held
        first = max(0, start + stage.prefill - stage.pool_draws + 1)
        last = stage.optimisation.steps + stage.prefill
        draws = prefetch(Draws(sources, stage, recipe.seed), first, last, recipe.workers)
        for number, raws in enumerate(draws, start=first):
            pool.add(look(tower, raws))
            step = number - stage.prefill
            if step < start:
                continue
            rng = np.random.default_rng([recipe.seed, 4, step])
            items = [item for kind, count in stage.batch.items() for item in pool.pick(kind, count, rng)]
            yield items, [write(item, writer, sources.prompt, stage.most_turns, rng) for item in items]

    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]

    def loss_of(batch: tuple[list[Seen], list[Sample]], step: int) -> Tensor:
        inputs = collate(*batch, stage.row_tokens, pad)
        if stage.dropout:
            # drawn by the step, so that one that is done again after an interruption hides the same
            drawn = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            kept = torch.rand(inputs["image_features"].shape, generator=drawn) >= stage.dropout
            inputs["image_features"] = inputs["image_features"] * kept / (1 - stage.dropout)
        return model(**inputs, use_cache=False).loss

    facts = loop.run(start, batches(), loss_of)
    model.eval()
    model.save_pretrained(folder)
    mark_done(folder, facts)
    return model


def write(item: Seen, writer: Writer, prompt: str, most_turns: int, rng: np.random.Generator) -> Sample:
    """An item as tokens: a clip whole, or up to `most_turns` of a picture's questions in random order."""
    if item.captions:
        return writer.clip(prompt, item.captions)
    count = int(rng.integers(1, most_turns + 1))
    return writer.dialogue([item.turns[int(i)] for i in rng.permutation(len(item.turns))[:count]])


def collate(items: Sequence[Seen], samples: Sequence[Sample], row_tokens: int, pad: int) -> dict[str, Tensor]:
    """Arguments for the fused model's forward pass: samples packed, their pictures' features in the same order."""
    rows = pack(samples, row_tokens, pad)
    features = [items[sample].features[picture] for sample, picture in rows.pictures]
    return {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "labels": rows.labels,
        "image_positions": rows.image_positions,
        "image_grid_thw": torch.tensor([(1, *items[sample].grid) for sample, _ in rows.pictures]).view(-1, 3),
        "image_features": torch.cat(features).float(),
    }
