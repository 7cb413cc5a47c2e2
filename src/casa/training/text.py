"""Stage `text`: a small Llama model learns the tasks' own text, without pictures.

It learns how questions and answers are worded and how a dialogue goes; what an answer says it can only guess
until it sees. The documents are the texts of examples whose pictures are thrown away.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from casa.errors import UserError
from casa.training.checkpoints import mark_done
from casa.training.conversation import Sample, Writer, without_pictures
from casa.training.loop import Loop, Monitor, Report
from casa.training.packing import PackedRows, pack
from casa.training.prefetch import prefetch
from casa.training.recipe import Recipe, TextStage
from casa.training.sources import Sources
from casa.training.texts import Documents, Texts
from casa.training.tokenizer import build_tokenizer


def new_text_model(stage: TextStage, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model with fresh weights. UserError if its settings do not fit together."""
    given = {"max_position_embeddings": 8192, "tie_word_embeddings": True, **stage.model}
    # a few ids stay unused: multiples of 8 multiply faster
    vocabulary = -(-len(tokenizer) // 8) * 8
    try:
        config = LlamaConfig(
            vocab_size=vocabulary,
            pad_token_id=cast(int, tokenizer.pad_token_id),
            bos_token_id=None,
            eos_token_id=cast(int, tokenizer.eos_token_id),
            **given,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"text.model does not make a Llama model: {str(error).strip().splitlines()[-1].strip()}"
        ) from error
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        max_new_tokens=32,
    )
    return model


def train_text(
    recipe: Recipe,
    sources: Sources,
    folder: Path,
    report: Report | None = None,
    monitor: Monitor | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Makes the tokenizer and trains the model; writes both to `folder` when done."""
    stage = recipe.text
    documents = _documents(recipe, sources)
    tokenizer = build_tokenizer([text for document in documents for text in document.all_texts()], stage.vocabulary)
    torch.manual_seed(recipe.seed + 1)
    model = new_text_model(stage, tokenizer)
    model.train()
    loop = Loop("text", folder, dict(model.named_parameters()), stage.optimisation, report)
    if monitor is not None:
        loop.watch = lambda step: monitor("text", step, model)
    start = loop.resume()
    writer = Writer(tokenizer)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]

    def batches() -> Iterator[PackedRows]:
        for step in range(start, stage.optimisation.steps):
            rng = np.random.default_rng([recipe.seed, 5, step])
            samples = [_sample(documents, writer, stage.most_turns, rng) for _ in range(stage.samples)]
            yield pack(samples, max(stage.row_tokens, *map(len, samples)), pad)

    def loss_of(rows: PackedRows, step: int) -> Tensor:
        return model(input_ids=rows.input_ids, position_ids=rows.position_ids, labels=rows.labels, use_cache=False).loss

    facts = loop.run(start, batches(), loss_of)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mark_done(folder, facts)
    return model, tokenizer


def _documents(recipe: Recipe, sources: Sources) -> list[Texts]:
    count = recipe.text.documents
    return list(prefetch(Documents(sources, recipe.seed), 0, count, recipe.workers))


def _sample(documents: list[Texts], writer: Writer, most_turns: int, rng: np.random.Generator) -> Sample:
    document = documents[int(rng.integers(len(documents)))]
    if document.captions:
        return without_pictures(writer.clip(document.prompt, document.captions))
    count = int(rng.integers(1, most_turns + 1))
    order = rng.permutation(len(document.turns))[:count]
    return without_pictures(writer.dialogue([document.turns[int(i)] for i in order]))
