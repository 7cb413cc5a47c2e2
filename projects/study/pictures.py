"""The pictures of a study, drawn once, with what the frozen image tower says of them: all runs ask about the same.

    folder/pages-train.safetensors   features float16 (n, N, C): n pictures, N image tokens each, C the tower's width
    folder/pages-train.json          facts of each picture: questions with answers, and what tasks of several ask about

Kinds: `pages` and `scenes` are casa's offline tasks on small pictures; `charts` have 2-4 coloured bars on handwritten
names. Pages of one line and scenes of one shape serve as `numbers` and `cards`, of which tasks show several at once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from casa.atomic import replacing, write_text
from casa.evaluation import CELL, Example, QuestionAnswer, Split, page, scene
from casa.evaluation.handwriting import Hand, draw_strength, on_paper, pick_scan, render_digits
from casa.evaluation.pages import stamp
from casa.evaluation.scenes import COLOURS, PLACES
from casa.models import CasaForConditionalGeneration
from projects.casa_tiny.tower import PATCH, encode_batch, patchify, to_pixels

QUESTIONS = 12  # drawn per picture; a sample asks some of them
SPLITS: tuple[Split, ...] = ("train", "held_out")
MOST_BARS, MOST_HEIGHT = 4, 5
_BATCH = 64  # pictures through the tower at once
_BAR = 18  # px wide
_KINDS = {"pages": 1, "scenes": 2, "charts": 3}
_CODES = {"train": 101, "held_out": 202}


@dataclass(frozen=True)
class Pictures:
    """Pictures of one kind.

    features: of each, float16 (N, C). grids: its rows and columns of patches. facts: its `turns`, and `lines`, `shapes`
    or `bars`.
    """

    features: Sequence[Tensor]
    grids: Sequence[tuple[int, int]]
    facts: Sequence[dict[str, Any]]

    def some(self, numbers: Sequence[int]) -> "Pictures":
        """Those of these numbers."""
        return Pictures(
            [self.features[number] for number in numbers],
            [self.grids[number] for number in numbers],
            [self.facts[number] for number in numbers],
        )


Bank = Mapping[str, Pictures]
"""Pictures by kind, of one split; `numbers` and `cards` among them."""


def make_pictures(folder: Path, counts: Mapping[str, Mapping[str, int]], seed: int, side: int) -> None:
    """Draws and encodes what is not in the folder yet.

    Args:
        folder: Where they are kept.
        counts: By split, how many of each kind.
        seed: Of everything drawn; the two splits never meet, whatever it is.
        side: px of a picture's sides, a multiple of 28.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing: list[tuple[str, Split]] = [
        (kind, split) for split in SPLITS for kind in counts[split] if not (folder / f"{kind}-{split}.json").is_file()
    ]
    if not missing:
        return
    tower = CasaForConditionalGeneration.from_pretrained("casa-tiny").vision.eval()
    for kind, split in missing:
        print(f"drawing {counts[split][kind]:,} {kind}, {split}", flush=True)
        facts, features = [], []
        for examples in _batches(kind, split, counts[split][kind], seed, side):
            patches = torch.from_numpy(np.stack([patchify(np.asarray(example.image)) for example in examples]))
            with torch.no_grad():
                features.append(encode_batch(tower, to_pixels(patches), (side // PATCH, side // PATCH)).half())
            facts += [_facts(example) for example in examples]
        with replacing(folder / f"{kind}-{split}.safetensors") as unfinished:
            save_file({"features": torch.cat(features)}, unfinished)
        write_text(folder / f"{kind}-{split}.json", json.dumps(facts) + "\n")


def read_pictures(folder: Path, split: Split, side: int) -> Bank:
    """The pictures of a split, and of these the pages of one line as `numbers`, the scenes of one shape as `cards`."""
    bank = {}
    for path in sorted(folder.glob(f"*-{split}.json")):
        features, facts = load_file(path.with_suffix(".safetensors"))["features"], json.loads(path.read_text("utf-8"))
        grids = [(side // PATCH, side // PATCH)] * len(facts)
        bank[path.name.removesuffix(f"-{split}.json")] = Pictures(features.unbind(), grids, facts)
    for name, kind, holds in (("numbers", "pages", "lines"), ("cards", "scenes", "shapes")):
        if kind in bank:
            bank[name] = bank[kind].some([n for n, facts in enumerate(bank[kind].facts) if len(facts[holds]) == 1])
    return bank


def _batches(kind: str, split: Split, count: int, seed: int, side: int) -> Iterator[list[Example]]:
    for start in range(0, count, _BATCH):
        yield [
            draw(kind, np.random.default_rng([_KINDS[kind], _CODES[split], seed, number]), split, side)
            for number in range(start, min(count, start + _BATCH))
        ]


def draw(kind: str, rng: np.random.Generator, split: Split, side: int) -> Example:
    """One picture of `side` x `side` px with its questions."""
    if kind == "pages":
        return page(rng, split, turns=QUESTIONS, sizes=[(side, side)])
    if kind == "scenes":
        return scene(rng, split, turns=QUESTIONS, sizes=[(side, side)])
    return chart(rng, split, side)


def _facts(example: Example) -> dict[str, Any]:
    found: dict[str, Any] = {"turns": [(turn.question, turn.answer, turn.kind) for turn in example.turns]}
    if "lines" in example.meta:
        found["lines"] = list(example.meta["lines"])
    if "shapes" in example.meta:
        height, width = example.image.height, example.image.width
        found["shapes"] = [(s.kind, s.colour, PLACES[s.place(height, width)]) for s in example.meta["shapes"]]
    if "bars" in example.meta:
        found["bars"] = example.meta["bars"]
    return found


def chart(rng: np.random.Generator, split: Split, side: int) -> Example:
    """Bars of different colours and heights, each over its handwritten name, a digit.

        6 |    ##
          | ## ##    ##
          | ## ## ## ##
            7  2  9  1

    Questions, by kind:
        value   "How high is the red bar?"             -> "3"     heights are whole: 1 to 5
        named   "How high is bar 7?"                   -> "3"     by its name
        legend  "What colour is bar 7?"                -> "red"   name and colour are matched
        owner   "Which bar is red?"                    -> "7"
        most    "Which colour is highest?"             -> "red"   all are compared
        higher  "Is the red bar higher than the blue?" -> "yes"   two are compared
    """
    count = int(rng.integers(2, MOST_BARS + 1))
    heights = rng.choice(MOST_HEIGHT, count, replace=False) + 1
    names = rng.choice(10, count, replace=False)
    colours = [[*COLOURS][int(number)] for number in rng.choice(len(COLOURS), count, replace=False)]
    strength = draw_strength(None, split, rng)
    scans = [pick_scan(int(digit), split, rng) for digit in names]
    alpha = np.zeros((side, side), dtype=np.uint8)
    pitch, foot = side / count, side - CELL
    middles = [(column + 0.5) * pitch + rng.uniform(-2, 2) for column in range(count)]
    inks = render_digits(scans, [CELL - 4.0] * count, rng, Hand.draw(rng), strength)
    for ink, x in zip(inks, middles, strict=True):
        stamp(alpha, ink, x, side - CELL / 2)
    image = on_paper(alpha, rng)
    pen = ImageDraw.Draw(image)
    unit = (foot - 4) / MOST_HEIGHT
    for x, height, colour in zip(middles, heights.tolist(), colours, strict=True):
        box = (x - _BAR / 2, foot - height * unit, x + _BAR / 2, foot)
        pen.rectangle(box, fill=_tinted(COLOURS[colour], rng), outline=(40, 40, 40))
    bars = list(zip(names.tolist(), colours, heights.tolist(), strict=True))
    return Example(image, tuple(_ask(bars, rng) for _ in range(QUESTIONS)), {"bars": bars})


def _tinted(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    shifted: NDArray[np.float64] = np.clip(np.array(colour) + rng.uniform(-14, 14, 3), 0, 255)
    return tuple(int(value) for value in shifted)


def _ask(bars: list[tuple[int, str, int]], rng: np.random.Generator) -> QuestionAnswer:
    kinds = ("value", "named", "legend", "owner", "most", "higher")
    kind = kinds[int(rng.integers(len(kinds)))]
    one, other = (bars[int(number)] for number in rng.choice(len(bars), 2, replace=False))
    name, colour, height = one
    asked = {
        "value": (f"How high is the {colour} bar?", str(height)),
        "named": (f"How high is bar {name}?", str(height)),
        "legend": (f"What colour is bar {name}?", colour),
        "owner": (f"Which bar is {colour}?", str(name)),
        "most": ("Which colour is highest?", max(bars, key=lambda bar: bar[2])[1]),
        "higher": (f"Is the {colour} bar higher than the {other[1]}?", "yes" if height > other[2] else "no"),
    }
    return QuestionAnswer(*asked[kind], kind)
