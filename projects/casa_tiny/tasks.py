"""What casa-tiny was trained on: the training split of the offline tasks, and sheets full of handwritten digits.

A page is mostly bare paper. A sheet has as many rows of digits as fit, so that a tower sees several times more
handwriting for the same work. It has no questions, and says nothing of lines and columns.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from casa.evaluation import Example, StreamExample, page, scene, stream, training_clip
from casa.evaluation.example import draw_size
from casa.evaluation.handwriting import Hand, draw_strength, on_paper, pick_scan, render_digits
from casa.evaluation.pages import (
    MAX_HEIGHT,
    MAX_SIDE,
    MIN_HEIGHT,
    MIN_LINE_PITCH,
    MIN_PITCH,
    MIN_SIDE,
    Glyph,
    spaced,
    stamp,
)
from casa.evaluation.stream import next_number

QUESTIONS = 16  # drawn per picture; each step asks some of them
# strokes bent until they are read about as well as those of writers never seen
ROUGH = (0.4, 2.0)
_MARGIN = 4

Size = tuple[int, int] | None


def pages(rng: np.random.Generator, size: Size) -> Example:
    """A page by writers of the training split, their strokes bent more or less."""
    return page(rng, "train", turns=QUESTIONS, sizes=_only(size))


def rough_pages(rng: np.random.Generator, size: Size) -> Example:
    """A page in rough strokes."""
    return page(rng, "train", turns=QUESTIONS, strength=ROUGH, sizes=_only(size))


def sheets(rng: np.random.Generator, size: Size) -> Example:
    """Handwriting all over the picture: for the tower, with no questions."""
    strength = draw_strength(None, "train", rng)
    alpha = np.zeros(draw_size(rng, _only(size), MIN_SIDE, MAX_SIDE), dtype=np.uint8)
    glyphs = _fill(alpha, rng, strength)
    return Example(on_paper(alpha, rng), (), {"glyphs": glyphs})


def scenes(rng: np.random.Generator, size: Size) -> Example:
    """A scene over a photograph of the training split."""
    return scene(rng, "train", turns=QUESTIONS, sizes=_only(size))


def frames(rng: np.random.Generator, size: Size) -> Example:
    """One frame of a stream, as a picture with no questions."""
    shown = stream(rng, "train", seconds=2.0, sizes=_only(size))
    times = shown.times()
    t = times[int(rng.integers(len(times)))]
    return Example(shown.frame(t), (), {"lines": (), "glyphs": shown.glyphs(t)})


def rough_clips(rng: np.random.Generator) -> StreamExample:
    """A stream in rough strokes, in which a number is often the one before but for a digit."""
    return training_clip(rng, strength=ROUGH, follow=often_kindred)


def often_kindred(previous: str, rng: np.random.Generator) -> str:
    """The number that follows: one time in three, the one before but for a digit."""
    if previous and rng.random() < 0.35:
        return kindred(previous, rng)
    return next_number(previous, rng)


def kindred(text: str, rng: np.random.Generator) -> str:
    """The number with another digit, or with one more (four at most) or fewer at an end."""
    how, at_front = rng.random(), rng.random() < 0.5
    if how < 0.2 and len(text) > 1:
        return text[1:] if at_front else text[:-1]
    if how < 0.4 and len(text) < 4:
        digit = str(rng.integers(10))
        return digit + text if at_front else text + digit
    place = int(rng.integers(len(text)))
    return text[:place] + str((int(text[place]) + int(rng.integers(1, 10))) % 10) + text[place + 1 :]


PICTURES: dict[str, Callable[[np.random.Generator, Size], Example]] = {
    "pages": pages,
    "rough_pages": rough_pages,
    "sheets": sheets,
    "scenes": scenes,
    "frames": frames,
}
CLIPS: dict[str, Callable[[np.random.Generator], StreamExample]] = {"clips": training_clip, "rough_clips": rough_clips}
# least and greatest side in px
SIDES = {
    "pages": (112, 672),
    "rough_pages": (112, 672),
    "sheets": (112, 672),
    "scenes": (112, 448),
    "frames": (224, 448),
}


def _fill(alpha: NDArray[np.uint8], rng: np.random.Generator, strength: float) -> list[Glyph]:
    """Writes rows from top to bottom into alpha (height, width), each by a hand of its own."""
    height, width = alpha.shape
    glyphs: list[Glyph] = []
    room = width - 2 * _MARGIN
    usual = MIN_HEIGHT * (MAX_HEIGHT / MIN_HEIGHT) ** rng.random()
    top, row = float(_MARGIN), 0
    while True:
        size = float(np.clip(usual * rng.uniform(0.8, 1.2), MIN_HEIGHT, MAX_HEIGHT))
        pitch = max(MIN_LINE_PITCH + 1, 1.12 * size)
        if top + pitch > height - _MARGIN:
            return glyphs
        row += 1
        digits = rng.integers(0, 10, int(room / MIN_PITCH))
        scans = [pick_scan(int(digit), "train", rng) for digit in digits]
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


def _only(size: Size) -> list[tuple[int, int]] | None:
    return None if size is None else [size]
