"""Puts a trained model into the package, with its model card and its moving picture: all that is left after training.

    python -m projects.casa_smol.ship runs/casa-smol                  -> src/casa/assets/casa-smol, docs/casa-smol.md

What goes in is what was added to SmolLM2: CASA layers, projector, image encoder with its words, and the tokenizer, at
most 30 MB. The folder is read again before it takes the place of the one that is there, and must be the model that was
trained, bit for bit. The page and the card are of the records at hand (`card.py`); evaluate the model first:

    python -m projects.casa_smol.evaluation runs/casa-smol/final --out docs/results/casa-smol.json
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

import casa
from casa import CasaForConditionalGeneration, CasaProcessor
from casa.atomic import write_text
from casa.models.loading import quietly
from projects.casa_smol import card, show
from projects.casa_smol.card import BACKBONES, FOLDER
from projects.casa_smol.tasks.films import PROMPT

MOST_BYTES = 30_000_000


class NotShippedError(Exception):
    """What is wrong with a model that was to be shipped, in a sentence."""


def ship(run: Path, folder: Path = FOLDER, backbones: Sequence[str] = BACKBONES) -> int:
    """Writes what a run's model adds to its backbone into a folder, whole or not at all.

    Args:
        run: Of `casa train`, or the folder of a model.
        folder: Takes the place of the one that is there.
        backbones: Where the backbone is found at loading, as for `save_pretrained`; the first is read now.

    Returns:
        The folder's bytes.

    Raises:
        NotShippedError: Training changed the language model, the folder would be too large, or is not what was trained.
    """
    source = run / "final" if (run / "final").is_dir() else run
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quietly(reports=False), TemporaryDirectory(dir=folder.parent, prefix=".casa-smol-") as place:
        model: Any = CasaForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
        processor: Any = CasaProcessor.from_pretrained(source)
        processor.stream_prompt, processor.stream_turns = PROMPT, True
        made = Path(place) / folder.name
        model.save_pretrained(made, added_only=True, packed=True, backbone=backbones)
        processor.save_pretrained(made)
        compact(made / "tokenizer.json")
        check(made, model)
        if folder.exists():
            folder.rename(Path(place) / "old")
        shutil.move(made, folder)
    return size_of(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def compact(file: Path) -> None:
    """Writes a tokenizer.json anew without blanks and with merges as texts: less than half the bytes, the same to it.

    Raises NotShippedError if the tokenizer were another one.
    """
    told = json.loads(file.read_text(encoding="utf-8"))
    merges = told["model"].get("merges") or []
    if merges and all(not isinstance(pair, str) and " " not in "".join(pair) for pair in merges):
        told["model"]["merges"] = [" ".join(pair) for pair in merges]
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    if Tokenizer.from_str(text).to_str() != Tokenizer.from_file(str(file)).to_str():
        raise NotShippedError("the tokenizer written small is another one; ship it as it is.")
    write_text(file, text)


def check(folder: Path, model: Any) -> None:
    """Raises NotShippedError unless the folder is small enough, without the language model, and loads as that model."""
    bytes_ = size_of(folder)
    if bytes_ > MOST_BYTES:
        raise NotShippedError(
            f"the folder has {bytes_ / 1e6:.1f} MB, and at most {MOST_BYTES / 1e6:.0f} MB are shipped."
        )
    again = CasaForConditionalGeneration.from_pretrained(folder)
    found, wanted = again.state_dict(), model.state_dict()
    other = [name for name, weight in wanted.items() if not torch.equal(found[name], weight)]
    if found.keys() != wanted.keys() or other:
        raise NotShippedError(f"read again, {len(other)} weights are others, the first is {other[:1]}.")
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = [name for name in file.keys() if name.startswith("backbone.")]  # noqa: SIM118 (no mapping)
    if kept:
        raise NotShippedError(
            f"training changed the language model ({len(kept)} weights, the first is {kept[0]}), which is to stay what "
            "it is; train with `trainable: added`."
        )


def main(arguments: list[str]) -> int:
    """Ships a run's model."""
    parser = argparse.ArgumentParser(description="Puts a trained casa-smol into the package.")
    parser.add_argument("run", type=Path, help="folder of the run of `casa train`, or of a model")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--backbone", nargs="+", default=BACKBONES, help="where it is found; the first is read now")
    parser.add_argument("--docs", type=Path, default=card.DOCS, help="folder of the page and the pictures")
    parser.add_argument("--scores", type=Path, default=card.SCORES)
    given = parser.parse_args(arguments)
    try:
        count = ship(given.run, given.out, given.backbone)
    except NotShippedError as error:
        print(f"not shipped: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: {count / 1e6:.1f} MB")
    pictures = show.pictures(casa.load(given.out), given.docs / "images")
    for file in chain(pictures, card.written(given.out, given.docs, given.scores)):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
