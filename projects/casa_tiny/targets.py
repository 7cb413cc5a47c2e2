"""Dense targets: what the image tower learns to say of each of its tokens, before any language is involved.

Legend: a cell is one merged image token, 28 x 28 px; targets[channel] int64 (height / 28, width / 28),
one class per cell

Every picture fills every channel (a page says "no shape here" in each cell), so that one tower learns all tasks from
one loss.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from casa.evaluation import CELL, Example
from casa.evaluation.pages import Glyph, texts
from casa.evaluation.scenes import COLOURS, SHAPES, SceneShape

NO_DIGIT = 10
UNSAID = -100  # a cell that says nothing about a channel; the loss passes over it

# Channel -> number of classes. Class 0 means "none", except in `digit`, where 0-9 are the digits themselves.
CHANNELS: dict[str, int] = {
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
EMPTY = {name: NO_DIGIT if name == "digit" else 0 for name in CHANNELS}
"""The class of each channel that means "nothing here"."""

_OF_LINES = ("line", "column", "last", "length", "lines")
_STRIPS = 18  # into which `across` and `down` divide a picture; a ninth has borders of these
_OWNED = 0.3  # a thing owns a cell when its box covers this share of it, and more than any other box does
# the box that a shape of a kind fills, about, of its diameter; triangles and stars leave the corners of theirs empty
_EXTENT = {"circle": 0.95, "square": 0.8, "triangle": 0.75, "star": 0.75}

DenseTargets = dict[str, NDArray[np.int64]]


def dense_targets(example: Example) -> DenseTargets:
    """The targets of a page, a scene, a sheet or a frame; a sheet says nothing of lines and columns."""
    width, height = example.image.size
    if "shapes" in example.meta:
        return scene_targets(example.meta["shapes"], height, width)
    targets = page_targets(example.meta["glyphs"], height, width)
    if "lines" not in example.meta:
        for name in _OF_LINES:
            targets[name].fill(UNSAID)
    return targets


def page_targets(glyphs: Sequence[Glyph], height: int, width: int) -> DenseTargets:
    """Targets of a page of `height` x `width` px."""
    targets = empty_targets(height, width)
    if not glyphs:
        return targets
    boxes = np.array([glyph.box for glyph in glyphs], dtype=np.float64)
    centres = np.array([glyph.centre for glyph in glyphs])
    lines = texts(glyphs)
    lengths = [len(lines[glyph.line - 1]) for glyph in glyphs]
    facts = {
        "digit": [glyph.digit for glyph in glyphs],
        "line": [glyph.line for glyph in glyphs],
        "column": [glyph.column for glyph in glyphs],
        "last": [2 if glyph.column == n else 1 for glyph, n in zip(glyphs, lengths, strict=True)],
        "length": lengths,
        "lines": [len(lines)] * len(glyphs),
    }
    _fill(targets, facts, owners(boxes, centres, height // CELL, width // CELL))
    return targets


def scene_targets(shapes: Sequence[SceneShape], height: int, width: int) -> DenseTargets:
    """Targets of a scene of `height` x `width` px; `shapes` must be in reading order."""
    targets = empty_targets(height, width)
    if not shapes:
        return targets
    centres = np.array([(shape.x, shape.y) for shape in shapes])
    radii = np.array([[shape.diameter / 2 * _EXTENT[shape.kind]] for shape in shapes])
    boxes = np.concatenate([centres - radii, centres + radii], axis=1)
    kinds = [shape.kind for shape in shapes]
    facts = {
        "shape": [SHAPES.index(kind) + 1 for kind in kinds],
        "colour": [[*COLOURS].index(shape.colour) + 1 for shape in shapes],
        "ordinal": [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)],
        "count": [kinds.count(kind) for kind in kinds],
        "ordinal_all": list(range(1, len(shapes) + 1)),
        "shapes": [len(shapes)] * len(shapes),
        "place": [shape.place(height, width) + 1 for shape in shapes],
    }
    _fill(targets, facts, owners(boxes, centres, height // CELL, width // CELL))
    columns, rows = (centres // CELL).astype(int).T
    targets["centre"][rows, columns] = 1
    return targets


def empty_targets(height: int, width: int) -> DenseTargets:
    """Targets of a picture that shows nothing: all say none, but for where a cell is."""
    rows, columns = height // CELL, width // CELL
    targets = {name: np.full((rows, columns), empty, dtype=np.int64) for name, empty in EMPTY.items()}
    targets["across"][:] = _strips(columns)
    targets["down"][:] = _strips(rows)[:, None]
    return targets


def owners(boxes: NDArray[np.float64], centres: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.int64]:
    """Which of n things each cell shows: int64 (rows, columns), -1 where it shows none.

    The cell under a thing's centre is its own (no two may share it); any other cell goes to the thing whose box covers
    most of it, if that is at least 30 % of the cell.

    Args:
        boxes: (n, 4), left, top, right, bottom in px.
        centres: (n, 2), x and y in px.
        rows: Cells from top to bottom.
        columns: Cells from left to right.
    """
    x, y = np.arange(columns) * CELL, np.arange(rows) * CELL
    left, top, right, bottom = boxes[:, :, None].transpose(1, 0, 2)
    across = np.minimum(x + CELL, right) - np.maximum(x, left)
    down = np.minimum(y + CELL, bottom) - np.maximum(y, top)
    share = np.maximum(down, 0)[:, :, None] * np.maximum(across, 0)[:, None, :] / CELL**2
    at = (centres // CELL).astype(np.int64)
    share[np.arange(len(boxes)), at[:, 1], at[:, 0]] = 2.0
    return np.where(share.max(axis=0) >= _OWNED, share.argmax(axis=0), -1)


def _fill(targets: DenseTargets, facts: dict[str, list[int]], owner: NDArray[np.int64]) -> None:
    covered = owner >= 0
    for name, values in facts.items():
        targets[name][covered] = np.array(values)[owner[covered]]


def _strips(cells: int) -> NDArray[np.int64]:
    """The strip, from 1, that holds the middle of each of so many cells."""
    return 1 + (2 * np.arange(cells, dtype=np.int64) + 1) * _STRIPS // (2 * cells)
