"""Dense targets of the page encoder, and batches of pages with them, by seed and step.

Shapes: n pages of H x W px, cells of 8 x 4 px, R = H / 8 rows, C = W / 4 columns.

    |  the middle 64 % of a character's width: its class, weight 1; +1 in the cell of its centre
    |  the rest of its line's height and its width: ignored
    |  elsewhere: class 0, weight 0.15
"""

from dataclasses import dataclass

import numpy as np

from casa.vision.page_encoder import CELL
from casa.vision.page_reading import FOLLOWING
from projects.casa_smol.canvas import Glyphs, colours_of
from projects.casa_smol.damage import placed, worn
from projects.casa_smol.pages import draw

MIDDLE = 0.64
BACKGROUND_WEIGHT = 0.15
NO_INK = 255
UNKNOWN = 255
LEAST_X_HEIGHT = 4.0  # pixels; smaller writing is ignored, as nobody reads it


@dataclass(frozen=True)
class Targets:
    """What a page's cells hold. All arrays are (R, C), but for centres.

    classes: uint8, 0 for none. weights: float32. middles: bool, cells of a character's centre.
    inks: uint8, colour of the character, NO_INK elsewhere. grounds: uint8, colour behind the text.
    centres: int64 (G, 4): row, column, class and word of every character whose middle is on the page.
    around: uint8 (1 + FOLLOWING, R, C): the class of the character before, and of those that follow, each 0 where the
        text ends; UNKNOWN where no character is, or where that one is not on the page.
    """

    classes: np.ndarray
    weights: np.ndarray
    middles: np.ndarray
    inks: np.ndarray
    grounds: np.ndarray
    centres: np.ndarray
    around: np.ndarray


def targets_of(glyphs: Glyphs, ground: np.ndarray) -> Targets:
    """glyphs: where they stand on the page as it is seen. ground: uint8 (H, W, 3), the page without text."""
    rows, columns = ground.shape[0] // CELL[0], ground.shape[1] // CELL[1]
    classes = np.zeros((rows, columns), dtype=np.uint8)
    weights = np.full((rows, columns), BACKGROUND_WEIGHT, dtype=np.float32)
    middles = np.zeros((rows, columns), dtype=bool)
    inks = np.full((rows, columns), NO_INK, dtype=np.uint8)
    holder = np.full((rows, columns), len(glyphs.classes))
    boxes = glyphs.boxes
    x, half = boxes[:, [0, 2]].mean(1), (boxes[:, 2] - boxes[:, 0]) / 2
    centre = np.stack([boxes[:, [1, 3]].mean(1) // CELL[0], x // CELL[1]], axis=1).astype(np.int64)
    inside = (centre >= 0).all(1) & (centre[:, 0] < rows) & (centre[:, 1] < columns)
    inside &= boxes[:, 3] - boxes[:, 1] >= LEAST_X_HEIGHT
    # cells whose centres lie in a span: first and one past the last
    whole = _span(boxes[:, 0], boxes[:, 2], CELL[1], columns, 0.0)
    lines = _span(glyphs.lines[:, 0], glyphs.lines[:, 1], CELL[0], rows, 0.0)
    wide = _span(x - MIDDLE * half, x + MIDDLE * half, CELL[1], columns, 0.5)
    high = _span(boxes[:, 1], boxes[:, 3], CELL[0], rows, 0.5)
    for (top, bottom), (left, right) in zip(lines.tolist(), whole.tolist(), strict=True):
        weights[top:bottom, left:right] = 0.0
    labelled = np.flatnonzero(inside)
    for number in labelled.tolist():
        (top, bottom), (left, right) = high[number], wide[number]
        classes[top:bottom, left:right] = glyphs.classes[number]
        weights[top:bottom, left:right] = 1.0
        inks[top:bottom, left:right] = glyphs.inks[number]
        holder[top:bottom, left:right] = number
    row, column = centre[labelled].T
    classes[row, column] = glyphs.classes[labelled]
    weights[row, column] = 2.0
    middles[row, column] = True
    inks[row, column] = glyphs.inks[labelled]
    holder[row, column] = labelled
    spots = ground[CELL[0] // 2 :: CELL[0], CELL[1] // 2 :: CELL[1]]
    centres = np.concatenate([centre[labelled], glyphs.classes[labelled, None], glyphs.words[labelled, None]], axis=1)
    around = _around(glyphs, inside)[:, holder]
    return Targets(classes, weights, middles, inks, colours_of(spots), centres, around)


def _around(glyphs: Glyphs, inside: np.ndarray) -> np.ndarray:
    """uint8 (1 + FOLLOWING, G + 1): classes of the characters around each; the last column is for no character."""
    count = len(glyphs.classes)
    found = np.full((1 + FOLLOWING, count + 1), UNKNOWN, dtype=np.uint8)
    seen = np.where(inside, glyphs.classes, UNKNOWN)
    for slot, step in enumerate((-1, *range(1, 1 + FOLLOWING))):
        other = np.arange(count) + step
        there = (other >= 0) & (other < count)
        other[~there] = 0
        found[slot, :-1] = np.where(there & (glyphs.runs[other] == glyphs.runs), seen[other], 0)
    return found


def _span(low: np.ndarray, high: np.ndarray, cell: int, count: int, inset: float) -> np.ndarray:
    """int64 (G, 2). inset 0.5: cells whose middle lies inside; 0: cells that are touched."""
    first = np.ceil(low / cell - inset) if inset else np.floor(low / cell)
    last = np.floor(high / cell - inset) + 1 if inset else np.ceil(high / cell)
    return np.clip(np.stack([first, last], axis=1), 0, count).astype(np.int64)


def page(
    seed: tuple[int, ...], size: tuple[int, int], split: str = "train", worn_by: float = 1.0
) -> tuple[np.ndarray, Targets, Glyphs]:
    """uint8 (H, W, 3) of `size` (width, height), its targets and characters; the same for the same seed."""
    rng = np.random.default_rng(seed)
    room = (size[0] + int(rng.integers(0, 65)), size[1] + int(rng.integers(0, 49)))
    canvas = draw(rng, room, split)
    image, ground, glyphs = placed(canvas, size, rng, turned=0.3 * worn_by)
    return np.array(worn(image, rng, worn_by)), targets_of(glyphs, np.asarray(ground)), glyphs
