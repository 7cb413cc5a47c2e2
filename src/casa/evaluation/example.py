"""What every offline task hands out: pictures, questions with their answers, and the random numbers they come from.

A generator belongs to one task, split and seed. The split is part of the entropy, so no seed of the training split can
give the pictures of any seed of the held-out split, whatever integers are chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

CELL = 28
"""px of an image token's side: patches of 14 px, merged 2 x 2."""

Split = Literal["train", "held_out"]

_TASKS = {"pages": 1, "scenes": 2, "stream": 3}
_SPLITS = {"train": 101, "held_out": 202}


@dataclass(frozen=True)
class QuestionAnswer:
    """One question about a picture, its exact answer, and the kind of question (named by each task)."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Example:
    """One RGB picture whose sides are multiples of 28 px, with questions.

    `meta` holds the facts that the picture was drawn from (task dependent), for checks, drawings and dense targets.
    """

    image: Image.Image
    turns: tuple[QuestionAnswer, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "train" or "held_out"."""
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; choose 'train' or 'held_out'.")


def generator(task: str, split: Split, seed: int, *more: int) -> np.random.Generator:
    """The generator of one example: any integer `seed`; `more` are non-negative sub-streams of it."""
    check_split(split)
    whole = 2 * seed if seed >= 0 else -2 * seed - 1
    return np.random.default_rng(np.random.SeedSequence([_TASKS[task], _SPLITS[split], whole, *more]))


def as_generator(task: str, split: Split, seed: int | np.random.Generator) -> np.random.Generator:
    """`seed` itself if it is a generator (training draws page after page from one), else a new one."""
    check_split(split)
    return seed if isinstance(seed, np.random.Generator) else generator(task, split, int(seed))


def draw_size(
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]] | None,
    least: int,
    most: int,
    max_side: int | None = None,
) -> tuple[int, int]:
    """A picture's (height, width) in px: one of `sizes`, or both sides drawn evenly from the multiples of 28
    between `least` and `max_side` (by default `most`). ValueError for a size that breaks these rules."""
    if sizes is not None:
        height, width = sizes[int(rng.integers(len(sizes)))]
    else:
        top = most if max_side is None else max_side
        height, width = (int(n) * CELL for n in rng.integers(least // CELL, top // CELL + 1, 2))
    for side in (height, width):
        if side % CELL or not least <= side <= most:
            raise ValueError(f"a side of {side} px was asked for; choose multiples of 28 from {least} to {most}.")
    return height, width
