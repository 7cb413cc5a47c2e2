"""Task `pages`: handwritten digits in lines on paper, to be read whole or one by one.

A page has 1-6 lines of 1-6 digits; place, size, hand and noise vary. Questions, by kind:
    line      "Read line 2."                        -> "4071"
    digit     "What is digit 3 of line 1?"          -> "7"
    lines     "How many lines are there?"           -> "3"
    length    "How many digits are in line 2?"      -> "4"
    last_line "Read the last line."                 -> "93"
Scores: `digits` is the share of right answers to questions of kind `digit`; `lines` is the share of exact
answers to questions of kind `line`. Evaluation asks one of each per page.

Layout rule: digits of a line are at least 28 px apart (centre to centre), lines at least 30 px, so that no
two digits have their centre in the same 28 px cell and every digit owns at least one cell.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from casa.evaluation.example import Example, QuestionAnswer, Split, as_generator, draw_size
from casa.evaluation.handwriting import Hand, Strength, draw_strength, on_paper, pick_scan, render_digits

MIN_SIDE, MAX_SIDE = 112, 672
MIN_HEIGHT, MAX_HEIGHT = 24.0, 64.0
MIN_PITCH, MIN_LINE_PITCH = 28.0, 30.0
MAX_LINES = MAX_DIGITS = 6
EVALUATION_TURNS = ("line", "digit")
KINDS = {"line": 0.4, "digit": 0.36, "lines": 0.08, "length": 0.1, "last_line": 0.06}  # of questions, and how often

_MARGIN = 5
_DIGITS_BY_WIDTH = 0.78  # a digit and its gap are at most this wide, in digit heights; only guides the layout


@dataclass(frozen=True)
class Glyph:
    """One digit on the page: its class, scan, line and column (from 1), and box in px."""

    digit: int
    scan: int
    line: int
    column: int
    box: tuple[float, float, float, float]  # left, top, right, bottom

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def page(
    seed: int | np.random.Generator,
    split: Split = "train",
    *,
    turns: int | Sequence[str] = 6,
    sizes: Sequence[tuple[int, int]] | None = None,
    max_side: int = MAX_SIDE,
    strength: Strength = None,
) -> Example:
    """Draws one page.

    Args:
        seed: Any integer, or a generator to draw on.
        split: Whose handwriting; "held_out" was never trained on.
        turns: How many questions (kinds drawn at random), or their kinds in order.
        sizes: (height, width) in px to choose from; by default both sides are drawn evenly from the multiples of 28 in
            112..`max_side`.
        max_side: px.
        strength: Extra bending of strokes, see `draw_strength`.

    Returns:
        The page, with `lines` (the texts) and `glyphs` in its `meta`.
    """
    rng = as_generator("pages", split, seed)
    bent = draw_strength(strength, split, rng)
    height, width = draw_size(rng, sizes, MIN_SIDE, MAX_SIDE, max_side)
    alpha, glyphs = _write(height, width, split, rng, bent)
    lines, image = texts(glyphs), on_paper(alpha, rng)
    return Example(image, _ask(lines, turns, rng), {"lines": lines, "glyphs": glyphs})


def texts(glyphs: Sequence[Glyph]) -> tuple[str, ...]:
    """The text of each line, top to bottom."""
    in_order = sorted(glyphs, key=lambda g: (g.line, g.column))
    lines = itertools.groupby(in_order, key=lambda g: g.line)
    return tuple("".join(str(glyph.digit) for glyph in line) for _, line in lines)


def _write(
    height: int, width: int, split: Split, rng: np.random.Generator, strength: float
) -> tuple[NDArray[np.uint8], list[Glyph]]:
    """Write the lines: alpha (height, width) and the glyphs in reading order."""
    tilt = math.tan(math.radians(rng.uniform(-1.5, 1.5)))
    drop = abs(tilt) * width / 2
    room_y = height - 2 * (_MARGIN + drop)
    room_x = width - 2 * _MARGIN
    number = int(rng.integers(1, min(MAX_LINES, int(room_y / MIN_LINE_PITCH)) + 1))
    wanted = int(rng.integers(1, min(MAX_DIGITS, int(room_x / MIN_PITCH)) + 1))
    tallest = min(MAX_HEIGHT, room_y / number / 1.15, room_x / wanted / _DIGITS_BY_WIDTH)
    usual = MIN_HEIGHT * (max(tallest, MIN_HEIGHT) / MIN_HEIGHT) ** rng.random()
    hand = Hand.draw(rng)

    heights = np.clip(usual * rng.uniform(0.88, 1.12, number), MIN_HEIGHT, max(tallest, MIN_HEIGHT))
    pitches = np.maximum(MIN_LINE_PITCH, 1.15 * np.maximum(heights[:-1], heights[1:]))
    spare = room_y - pitches.sum() - (heights[0] + heights[-1]) / 2
    gaps = spare * rng.dirichlet(np.ones(number + 1)) if spare > 0 else np.zeros(number + 1)
    centres = _MARGIN + drop + heights[0] / 2 + gaps[0] + np.concatenate([[0], np.cumsum(pitches + gaps[1:-1])])

    counts = rng.integers(1, MAX_DIGITS + 1, number)
    counts = np.where(rng.random(number) < 0.3, np.maximum(counts, wanted), counts)
    counts = np.minimum(counts, int(room_x / MIN_PITCH))
    digits = rng.integers(0, 10, counts.sum())
    scans = [pick_scan(int(digit), split, rng) for digit in digits]
    sizes = np.repeat(heights, counts) * rng.uniform(0.94, 1.04, len(scans))
    drawn = list(zip(digits.tolist(), scans, render_digits(scans, sizes, rng, hand, strength), strict=True))

    alpha = np.zeros((height, width), dtype=np.uint8)
    glyphs: list[Glyph] = []
    for line, end in enumerate(np.cumsum(counts)):
        row = drawn[end - counts[line] : end]
        offsets = spaced([ink.shape[1] for _, _, ink in row], float(heights[line]), room_x, rng)
        first = offsets[0] - row[0][2].shape[1] / 2
        last = offsets[-1] + row[len(offsets) - 1][2].shape[1] / 2
        start = _MARGIN - first + rng.uniform(0, max(0.0, room_x - (last - first)))
        # digits that did not fit are dropped: zip stops at the last offset
        for column, ((digit, scan, ink), offset) in enumerate(zip(row, offsets, strict=False), start=1):
            x = start + offset
            box = stamp(alpha, ink, x, centres[line] + tilt * (x - width / 2))
            glyphs.append(Glyph(digit, scan, line + 1, column, box))
    return alpha, glyphs


def spaced(widths: Sequence[int], size: float, room: float, rng: np.random.Generator) -> list[float]:
    """Centres of as many digits as fit, the first at 0, px: 29 apart or more (28 once rounded)."""
    spread = rng.uniform(0.06, 0.3) * size
    offsets = [0.0]
    for before, after in itertools.pairwise(widths):
        step = max(MIN_PITCH + 1.0, (before + after) / 2 + 2 + spread * rng.uniform(0.6, 1.0))
        if offsets[-1] + step + (widths[0] + after) / 2 > room:
            break
        offsets.append(offsets[-1] + step)
    return offsets


def stamp(alpha: NDArray[np.uint8], ink: NDArray[np.uint8], x: float, y: float) -> tuple[int, int, int, int]:
    """Put `ink` with its centre at about (x, y), moved inside the page; returns its box."""
    height, width = ink.shape
    left = min(max(round(x - width / 2), 0), alpha.shape[1] - width)
    top = min(max(round(y - height / 2), 0), alpha.shape[0] - height)
    under = alpha[top : top + height, left : left + width]
    np.maximum(under, ink, out=under)
    return left, top, left + width, top + height


def _ask(lines: Sequence[str], turns: int | Sequence[str], rng: np.random.Generator) -> tuple[QuestionAnswer, ...]:
    kinds = rng.choice([*KINDS], turns, p=[*KINDS.values()]).tolist() if isinstance(turns, int) else turns
    return tuple(_turn(kind, lines, rng) for kind in kinds)


def _turn(kind: str, lines: Sequence[str], rng: np.random.Generator) -> QuestionAnswer:
    number = int(rng.integers(len(lines))) + 1
    text = lines[number - 1]
    place = int(rng.integers(len(text))) + 1 if kind == "digit" else 0
    asked = {
        "line": (f"Read line {number}.", text),
        "digit": (f"What is digit {place} of line {number}?", text[place - 1]),
        "lines": ("How many lines are there?", str(len(lines))),
        "length": (f"How many digits are in line {number}?", str(len(text))),
        "last_line": ("Read the last line.", lines[-1]),
    }
    if kind not in asked:
        raise ValueError(f"{kind!r} is no kind of page question; choose from {', '.join(asked)}.")
    return QuestionAnswer(*asked[kind], kind)
