"""The real scale: a frozen language model with casa-smol's page encoder, on casa-smol's tasks.

    folder/pictures/line-train.safetensors   features float16 (tokens of all pictures, C); grids int64 (n, 2)
    folder/pictures/line-train.json          of each picture its questions with answers

Of the text model nothing is trained but LoRA's adapters, where a run has them, so that all methods begin from the same
model and can train as many parameters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from casa import adapt
from casa.atomic import replacing, write_text
from casa.errors import UserError
from casa.models import FusionConfig
from casa.provenance import fingerprint
from casa.training.config import LoraSettings
from casa.training.models import with_lora
from casa.vision import spec_of
from casa.vision.page_encoder import CODE_STEP, PageEncoder, image_processor
from casa.vision.page_words import BEFORE, TAGS
from projects.casa_smol.tasks import asked
from projects.casa_tiny.chat import ASSISTANT, END, FRAME, USER
from projects.study.grid import Study
from projects.study.pictures import SPLITS, Bank, Pictures
from projects.study.printed import PRINTED, printed
from projects.study.shared import Beginning, claim

MARKS = {
    USER: "<|im_start|>user\n",
    FRAME: "",
    END + ASSISTANT: "<|im_end|>\n<|im_start|>assistant\n",
    END: "<|im_end|>\n",
}
"""The chat template of casa-smol, by casa-tiny's marks."""


@dataclass(frozen=True)
class RealBeginning(Beginning):
    """What a run begins from at the real scale. eyes: the page encoder's folder."""

    eyes: Path = Path()

    @property
    def fingerprints(self) -> dict[str, str | None]:
        return super().fingerprints | {"eyes": fingerprint(self.eyes)}

    def model(self, fusion: FusionConfig, seed: int, lora: int = 0) -> Any:
        """The frozen text model and page encoder, fused; what is new is drawn by the seed.

        A linear projector begins with words as the text model's embeddings have them, in all methods (`align`).
        """
        torch.manual_seed(seed)
        model: Any = adapt(str(self.text), fusion=fusion, vision=str(self.eyes))
        if fusion.projector == "linear" and len(getattr(model.vision, "word_codes", ())):
            align(model.projector.map, model.vision, model.get_input_embeddings().weight)
        model.backbone.requires_grad_(False).bfloat16()
        model.vision.requires_grad_(False)
        if lora:
            model = with_lora(model, LoraSettings(rank=lora, alpha=2.0 * lora))
        for parameter in model.parameters():
            if parameter.requires_grad:  # a step is finer than bfloat16
                parameter.data = parameter.data.float()
        return model


@torch.no_grad()
def align(projector: Any, encoder: Any, embeddings: Tensor) -> None:
    """Makes a linear projector put the first word that begins in an image token where that word's embedding lies.

    By least squares over the vocabulary, from the encoder's code of a word: 99 % of words lie nearest to their own. The
    mean embedding, three times as long as what tells words apart, is left out: a block's norm would leave little of a
    word beside it. What else an image token tells is mapped to nothing.

    Args:
        projector: A linear layer (d_v -> D).
        encoder: A page encoder that tells words.
        embeddings: (V, D), of the text model.
    """
    sizes = encoder.config.word_sizes
    start = sum(sizes[: len(TAGS) + BEFORE])
    codes, table = encoder.word_codes.float() * CODE_STEP, embeddings.float()
    ridge = codes.T @ codes + torch.eye(codes.shape[1])
    projector.weight.zero_()
    found = torch.linalg.solve(ridge, codes.T @ (table - table.mean(0)))
    projector.weight[:, start : start + codes.shape[1]] = found.T.to(projector.weight.dtype)
    projector.bias.zero_()


def begin_real(study: Study, folder: Path) -> RealBeginning:
    """Draws and encodes what is not in the folder yet, and reads all of it.

    Raises:
        UserError: The parts are not there, or the folder holds what another study began from.
    """
    shared, parts = study.shared, Path(study.shared.parts)
    if not (parts / "eyes").is_dir():
        raise UserError(f"there are no parts at {parts}; make them: python -m projects.casa_smol.parts {parts}")
    claim(folder, shared)
    encode_pages(folder / "pictures", shared.pictures, shared.seed, parts / "eyes")
    banks = {split: read_pages(folder / "pictures", split) for split in SPLITS}
    return RealBeginning(parts / "text", banks, AutoTokenizer.from_pretrained(parts / "text"), MARKS, parts / "eyes")


def encode_pages(folder: Path, counts: Mapping[str, Mapping[str, int]], seed: int, eyes: Path) -> None:
    """Draws and encodes pictures, a file for each task and split; one that is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        (task, split) for split in SPLITS for task in counts[split] if not (folder / f"{task}-{split}.json").is_file()
    ]
    if not missing:
        return
    encoder = PageEncoder.from_pretrained(eyes, dtype=torch.float32).eval()
    process, run = image_processor(encoder.config), spec_of(encoder.config).run
    for task, split in missing:
        print(f"drawing {counts[split][task]:,} of {task}, {split}", flush=True)
        features, grids, facts = [], [], []
        for one in (printed if task in PRINTED else asked)(task, split, seed, counts[split][task]):
            seen = process([one.picture], return_tensors="pt")
            with torch.no_grad():
                features.append(run(encoder, seen["pixel_values"], seen["image_grid_thw"]).half())
            grids.append(seen["image_grid_thw"][0, 1:])
            facts.append({"turns": [(turn.question, turn.answer, "all") for turn in one.turns]})
        with replacing(folder / f"{task}-{split}.safetensors") as unfinished:
            save_file({"features": torch.cat(features), "grids": torch.stack(grids)}, unfinished)
        write_text(folder / f"{task}-{split}.json", json.dumps(facts) + "\n")


def read_pages(folder: Path, split: str) -> Bank:
    """The pictures of a split, by task."""
    bank = {}
    for path in sorted(folder.glob(f"*-{split}.json")):
        held, facts = load_file(path.with_suffix(".safetensors")), json.loads(path.read_text(encoding="utf-8"))
        grids = [(rows, columns) for rows, columns in held["grids"].tolist()]
        features = held["features"].split([rows * columns for rows, columns in grids])
        bank[path.name.removesuffix(f"-{split}.json")] = Pictures(features, grids, facts)
    return bank
