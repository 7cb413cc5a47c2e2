"""What all runs of a study begin from, made once in its folder: pictures with their features, and one text model.

folder/pictures/    see `projects.study.pictures`
folder/text/        tokenizer and text model, trained on the words of all tasks without pictures
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from casa.atomic import write_text
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, FusionConfig, adapt
from casa.provenance import fingerprint
from projects.casa_tiny.chat import ChatTokens, build_tokenizer, pack
from projects.study.grid import Shared, Study
from projects.study.pictures import SPLITS, Bank, make_pictures, read_pictures
from projects.study.tasks import SMALL, Sample, Writer, described, training_batch
from projects.study.training import train_steps

_DOCUMENTS = 2000  # samples whose text the tokenizer is made from


@dataclass(frozen=True)
class Beginning:
    """What a run begins from. text: folder of the text model. banks: pictures by split. marks: see `Writer`."""

    text: Path
    banks: dict[str, Bank]
    tokenizer: PreTrainedTokenizerBase
    marks: Mapping[str, str] = field(default_factory=dict)

    def writer(self, gist: Sequence[int] = ()) -> Writer:
        """What writes samples in the text model's words. gist: a model's ids of gist tokens."""
        return Writer(self.tokenizer, gist, self.marks)

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the weights that a run begins from; for its record."""
        return {"text_model": fingerprint(self.text)}

    def model(self, fusion: FusionConfig, seed: int, lora: int = 0) -> Any:
        """The text model and casa-tiny's image tower, fused; the tower is frozen, what is new is drawn by the seed."""
        if lora:
            raise UserError("lora is for the real scale, whose text model is frozen; leave it out.")
        torch.manual_seed(seed)
        text = LlamaForCausalLM.from_pretrained(self.text, attn_implementation="sdpa")
        tower = CasaForConditionalGeneration.from_pretrained("casa-tiny").vision
        model = adapt(text, fusion=fusion, vision=tower)
        model.vision.requires_grad_(False)
        return model

    def inputs(
        self, samples: list[Sample], written: list[ChatTokens], split: str, row_tokens: int
    ) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
        """Samples packed into rows with the features of their pictures.

        Returns:
            The model's arguments; and of each sample its number, its row, and where in the row it begins.
        """
        longest = max(len(each.ids) for each in written)
        rows = pack(written, max(row_tokens, longest), cast(int, self.tokenizer.pad_token_id))
        bank = self.banks[split]
        shown = [samples[sample].pictures[picture] for sample, picture in rows.pictures]
        starts = [
            (sample, row, place - written[sample].places[0])
            for (sample, picture), (row, place) in zip(rows.pictures, rows.image_positions.tolist(), strict=True)
            if picture == 0
        ]
        inputs = {
            **rows.inputs,
            "image_positions": rows.image_positions,
            "image_grid_thw": torch.tensor([(1, *bank[kind].grids[number]) for kind, number in shown]).view(-1, 3),
            "image_features": torch.cat([bank[kind].features[number] for kind, number in shown]).float(),
        }
        return inputs, starts


def begin(study: Study, folder: Path) -> Beginning:
    """Makes what is missing in the folder, and reads all of it.

    Raises:
        UserError: The folder holds what another study began from.
    """
    shared = study.shared
    claim(folder, shared)
    make_pictures(folder / "pictures", shared.pictures, shared.seed, shared.side)
    banks = {split: read_pictures(folder / "pictures", split, shared.side) for split in SPLITS}
    if not (folder / "text" / "config.json").is_file():
        make_text_model(shared, study.device, banks["train"], folder)
    return Beginning(folder / "text", banks, AutoTokenizer.from_pretrained(folder / "text"))


def claim(folder: Path, shared: Shared) -> None:
    """Notes what all runs of a folder begin from. Raises UserError if it holds what another study began from."""
    values = json.dumps(json.loads(json.dumps(shared, default=vars)), indent=1) + "\n"
    path = folder / "shared.json"
    if path.is_file() and path.read_text(encoding="utf-8") != values:
        raise UserError(f"{folder} holds runs that began from something else; give another folder, or the same study.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, values)


def make_text_model(shared: Shared, device: str, bank: Bank, folder: Path) -> None:
    """Makes the tokenizer and a text model that answers all tasks where pictures are put in words, in `folder/text`."""
    weights = dict.fromkeys(SMALL, 1.0)
    rng = np.random.default_rng([shared.seed, 11])
    drawn = training_batch(weights, bank, rng, _DOCUMENTS, 4)
    texts = [part for sample in drawn for part in (*sample.parts, *described(sample, bank).parts)]
    tokenizer = build_tokenizer(texts, shared.vocabulary)
    model = new_text_model(shared, tokenizer)
    writer, budget = Writer(tokenizer), shared.text_budget

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        for step in range(start, budget.steps):
            rng = np.random.default_rng([shared.seed, 12, step])
            samples = training_batch(weights, bank, rng, budget.samples, budget.most_turns)
            written = [writer.write(described(sample, bank)) for sample in samples]
            longest = max(len(each.ids) for each in written)
            yield pack(written, max(budget.row_tokens, longest), cast(int, tokenizer.pad_token_id)).inputs

    train_steps(model, batches, budget, shared.seed, device, folder / "text-checkpoints", "text")
    part = folder / ".text"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder / "text")


def new_text_model(shared: Shared, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model with fresh weights."""
    ids = {"eos_token_id": cast(int, tokenizer.eos_token_id), "pad_token_id": cast(int, tokenizer.pad_token_id)}
    given = {"max_position_embeddings": 4096, "tie_word_embeddings": True, **shared.text}
    # a few ids stay unused: multiples of 8 multiply faster
    config = LlamaConfig(vocab_size=-(-len(tokenizer) // 8) * 8, bos_token_id=None, **ids, **given)
    config._attn_implementation = "sdpa"
    torch.manual_seed(shared.seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids, max_new_tokens=32)
    return model
