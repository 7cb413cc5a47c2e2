"""What every offline task hands out: pictures, questions with their answers, and dense targets.

Legend: a *cell* is one merged image token: 28 x 28 px (patches of 14 px, merged 2 x 2).
    dense[channel] : int64 (height / 28, width / 28), one class per cell

Dense targets teach the image tower what lies under each of its tokens before any language is involved.
Every task fills every channel (a page says "no shape here" in each cell), so that one tower learns all tasks
from one loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELL = 28

Split = Literal["train", "held_out"]

DenseTargets = dict[str, NDArray[np.int64]]

NO_DIGIT = 10
UNSAID = -100  # a cell that says nothing about a channel; a loss passes over it

# Channel -> number of classes. Class 0 means "none", except in `digit`, where 0-9 are the digits themselves.
DENSE_CHANNELS: dict[str, int] = {
    "digit": 11,  # 0-9; 10 none
    "line": 7,  # number of the digit's line, from the top
    "column": 7,  # place of the digit in its line, from the left
    "last": 3,  # 1 another digit follows in the line, 2 last of its line
    "length": 7,  # number of digits in the digit's line
    "lines": 7,  # number of lines on the page
    "shape": 5,  # 1-4, in the order of scenes.SHAPES
    "colour": 7,  # 1-6, in the order of scenes.COLOURS
    "ordinal": 5,  # the shape's place among shapes of its kind, in reading order
    "count": 5,  # number of shapes of its kind
    "ordinal_all": 5,  # the shape's place among all shapes, in reading order
    "shapes": 5,  # number of shapes
    "centre": 2,  # 1 in the one cell that holds a shape's centre: what counting can count
    "place": 10,  # 1-9, the ninth of the picture that holds the shape's centre, in reading order
    "across": 19,  # 1-18, where every cell is, from the left: a tower has relative positions only
    "down": 19,  # 1-18, from the top
}
_STRIPS = 18  # into which `across` and `down` divide a picture; a ninth has borders of these


@dataclass(frozen=True)
class Turn:
    """One question about a picture, its exact answer, and the kind of question (named by each task)."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Example:
    """One RGB picture whose sides are multiples of 28 px, with questions and dense targets.

    `meta` holds the facts that the picture was drawn from (task dependent), for checks and drawings.
    """

    image: Image.Image
    turns: tuple[Turn, ...]
    dense: DenseTargets
    meta: Mapping[str, Any] = field(default_factory=dict)


def empty_dense(height: int, width: int) -> DenseTargets:
    """Dense targets of a picture of `height` x `width` px that shows nothing: all say none, but for where a cell is."""
    rows, columns = height // CELL, width // CELL
    targets = {name: np.zeros((rows, columns), dtype=np.int64) for name in DENSE_CHANNELS}
    targets["digit"].fill(NO_DIGIT)
    targets["across"][:] = _strips(columns)
    targets["down"][:] = _strips(rows)[:, None]
    return targets


def _strips(cells: int) -> NDArray[np.int64]:
    """The strip, from 1, that holds the middle of each of so many cells."""
    return 1 + (2 * np.arange(cells, dtype=np.int64) + 1) * _STRIPS // (2 * cells)


def own_cells(
    boxes: NDArray[np.float64], centres: NDArray[np.float64], rows: int, columns: int, least: float
) -> NDArray[np.int64]:
    """Which of n things each cell shows: int64 (rows, columns), -1 where it shows none.

    boxes: (n, 4), left, top, right, bottom in px; centres: (n, 2), x and y in px. The cell under a thing's
    centre is its own (no two may share it); any other cell goes to the thing whose box covers most of it, if
    that is at least `least` of the cell.
    """
    if len(boxes) == 0:
        return np.full((rows, columns), -1)
    x, y = np.arange(columns) * CELL, np.arange(rows) * CELL
    left, top, right, bottom = boxes[:, :, None].transpose(1, 0, 2)
    across = np.minimum(x + CELL, right) - np.maximum(x, left)
    down = np.minimum(y + CELL, bottom) - np.maximum(y, top)
    share = np.maximum(down, 0)[:, :, None] * np.maximum(across, 0)[:, None, :] / CELL**2
    at = (centres // CELL).astype(np.int64)
    share[np.arange(len(boxes)), at[:, 1], at[:, 0]] = 2.0
    return np.where(share.max(axis=0) >= least, share.argmax(axis=0), -1)


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
