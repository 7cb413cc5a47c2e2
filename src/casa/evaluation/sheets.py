"""Sheets full of handwritten digits: no task, but what an image tower learns most from per picture.

A page is mostly bare paper. A sheet has as many rows of digits as fit, so that a tower sees several times more
handwriting for the same work. It says of every cell which digit is there, and nothing of lines and columns.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from casa.evaluation.example import UNSAID, Example, Split, draw_size
from casa.evaluation.ink import Hand, pick_scan, render_digits
from casa.evaluation.pages import (
    MAX_HEIGHT,
    MAX_SIDE,
    MIN_HEIGHT,
    MIN_LINE_PITCH,
    MIN_PITCH,
    MIN_SIDE,
    Glyph,
    page_targets,
    spaced,
    stamp,
)
from casa.evaluation.paper import compose, draw_paper, ink_colour, noise
from casa.evaluation.seeds import as_generator

_MARGIN = 4
_OF_LINES = ("line", "column", "last", "length", "lines")  # channels about which a sheet says nothing


def sheet(
    seed: int | np.random.Generator,
    split: Split = "train",
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    strength: float = 1.0,
) -> Example:
    """Draw one sheet; arguments as those of `page`. No questions; `meta` holds `glyphs`."""
    rng = as_generator("sheets", split, seed)
    height, width = draw_size(rng, sizes, MIN_SIDE, MAX_SIDE)
    alpha, glyphs = _fill(height, width, split, rng, strength)
    sigma = rng.uniform(1, 13)
    image = compose(draw_paper(height, width, rng), alpha, ink_colour(rng), noise(height, width, rng), sigma)
    dense = page_targets(glyphs, height, width)
    for name in _OF_LINES:
        dense[name].fill(UNSAID)
    return Example(image=image, turns=(), dense=dense, meta={"glyphs": glyphs})


def _fill(
    height: int, width: int, split: Split, rng: np.random.Generator, strength: float
) -> tuple[NDArray[np.uint8], list[Glyph]]:
    """Write rows from top to bottom, each by a hand of its own: alpha (height, width) and the glyphs."""
    alpha = np.zeros((height, width), dtype=np.uint8)
    glyphs: list[Glyph] = []
    room = width - 2 * _MARGIN
    usual = MIN_HEIGHT * (MAX_HEIGHT / MIN_HEIGHT) ** rng.random()
    top, row = float(_MARGIN), 0
    while True:
        size = float(np.clip(usual * rng.uniform(0.8, 1.2), MIN_HEIGHT, MAX_HEIGHT))
        pitch = max(MIN_LINE_PITCH + 1, 1.12 * size)
        if top + pitch > height - _MARGIN:
            return alpha, glyphs
        row += 1
        digits = rng.integers(0, 10, int(room / MIN_PITCH))
        scans = [pick_scan(int(digit), split, rng) for digit in digits]
        inks = render_digits(scans, size * rng.uniform(0.94, 1.04, len(scans)), rng, Hand.draw(rng), strength)
        offsets = spaced([ink.shape[1] for ink in inks], size, room, rng)
        first = _MARGIN + inks[0].shape[1] / 2 + rng.uniform(0, 6)
        # digits that did not fit are dropped: zip stops at the last offset
        for column, (digit, scan, ink, offset) in enumerate(
            zip(digits.tolist(), scans, inks, offsets, strict=False), start=1
        ):
            box = stamp(alpha, ink, first + offset, top + pitch / 2)
            glyphs.append(Glyph(digit, scan, row, column, box))
        top += pitch
