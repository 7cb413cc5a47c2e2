"""Task `stream`: a video of paper on which handwritten numbers come and go; captions say what is new.

The scene is a function of time, so frames sampled at 2 fps are exactly those of the 30 fps video. Numbers
have 1-4 digits, one is visible at a time, and each differs from the one before. They appear and vanish within
a tenth of a second, never near a multiple of half a second: at 2 fps every number is wholly there or not at
all. The caption of a frame is the number that was not there in the frame before, or "" when nothing is new.

Score: `wer`, the word error rate of all captions of a stream joined, numbers being words.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from casa.evaluation.example import CELL, Split, as_generator, draw_size
from casa.evaluation.handwriting import (
    Hand,
    Strength,
    compose,
    draw_paper,
    draw_strength,
    grainy,
    ink_colour,
    noise,
    pick_scan,
    render_digits,
)
from casa.evaluation.pages import MIN_HEIGHT, MIN_PITCH, Glyph

MIN_SIDE, MAX_SIDE = 224, 448
FPS = 2  # captions are given, and models shown the video, at this rate
PROMPT = "Say each new number."

Follow = Callable[[str, np.random.Generator], str]
"""Draws a number, given the one before ("" at first)."""

LEAST_ZOOM = math.exp(-0.1)

_PAN = 0.06  # of the frame's side, to each side
_ROLL = math.radians(1.5)
_SHAKE = 1.2  # px
_MARGIN = 1.36  # sheet over frame: covers pan, least zoom, roll and shake
_FADE = 0.08  # s to appear or vanish
_CLEAR = 0.12  # s between a change and the nearest sampled frame, at least
_SHORT, _LONG = (6, 12), (13, 40)  # frames of a clip to train on, fewest and most
_EDGE = 4  # px that a number keeps from the frame's border
_LEAST_PITCH = (MIN_PITCH + 1) / LEAST_ZOOM
_LEAST_HEIGHT = (MIN_HEIGHT + 1) / LEAST_ZOOM
_DIGITS = (0.15, 0.35, 0.35, 0.15)  # how often a number has 1, 2, 3, 4 digits


@dataclass(frozen=True)
class _Waves:
    """A sum of sine waves: smooth, never leaves +-1, and defined for every t."""

    hertz: tuple[float, ...]
    phase: tuple[float, ...]

    @staticmethod
    def draw(rng: np.random.Generator, slowest: float, fastest: float) -> "_Waves":
        hertz, phase = rng.uniform(slowest, fastest, 2), rng.uniform(0, 2 * math.pi, 2)
        return _Waves(tuple(hertz.tolist()), tuple(phase.tolist()))

    def __call__(self, t: float) -> float:
        waves = (math.sin(2 * math.pi * f * t + p) for f, p in zip(self.hertz, self.phase, strict=True))
        return sum(waves) / len(self.hertz)


@dataclass(frozen=True)
class Camera:
    """The view of a frame of `height` x `width` px on a larger sheet, as a function of time."""

    height: int
    width: int
    pan: tuple[_Waves, _Waves]
    shake: tuple[_Waves, _Waves]
    zoom: _Waves
    roll: _Waves

    @staticmethod
    def draw(height: int, width: int, rng: np.random.Generator) -> "Camera":
        return Camera(
            height,
            width,
            pan=(_Waves.draw(rng, 0.03, 0.16), _Waves.draw(rng, 0.03, 0.16)),
            shake=(_Waves.draw(rng, 1.5, 7.0), _Waves.draw(rng, 1.5, 7.0)),
            zoom=_Waves.draw(rng, 0.03, 0.12),
            roll=_Waves.draw(rng, 0.05, 0.3),
        )

    @property
    def sheet_size(self) -> tuple[int, int]:
        """Height and width of a sheet that no view ever leaves, px."""
        return math.ceil(self.height * _MARGIN) + 4, math.ceil(self.width * _MARGIN) + 4

    def scale(self, t: float) -> float:
        """Frame px per sheet px."""
        return math.exp(0.1 * self.zoom(t))

    def affine(self, t: float) -> tuple[float, float, float, float, float, float]:
        """Frame to sheet: x' = a x + b y + c, y' = d x + e y + f. Pillow's order and direction."""
        angle, scale = _ROLL * self.roll(t), self.scale(t)
        a, b = math.cos(angle) / scale, math.sin(angle) / scale
        sheet_h, sheet_w = self.sheet_size
        x = sheet_w / 2 + _PAN * self.width * self.pan[0](t) + _SHAKE * self.shake[0](t)
        y = sheet_h / 2 + _PAN * self.height * self.pan[1](t) + _SHAKE * self.shake[1](t)
        return (
            *(a, b, x - a * self.width / 2 - b * self.height / 2),
            *(-b, a, y + b * self.width / 2 - a * self.height / 2),
        )

    def to_sheet(self, x: float, y: float, t: float) -> tuple[float, float]:
        """Where on the sheet the frame's point (x, y) lies at time t."""
        a, b, c, d, e, f = self.affine(t)
        return a * x + b * y + c, d * x + e * y + f

    def to_frame(self, x: float, y: float, t: float) -> tuple[float, float]:
        """Where in the frame the sheet's point (x, y) appears at time t."""
        a, b, c, d, e, f = self.affine(t)
        x, y, size = x - c, y - f, a * e - b * d
        return (e * x - b * y) / size, (a * y - d * x) / size


@dataclass(frozen=True)
class Number:
    """A number on the sheet: its text, glyphs (boxes in sheet px), and when it appears and vanishes (s)."""

    text: str
    glyphs: tuple[Glyph, ...]
    inks: tuple[NDArray[np.uint8], ...] = field(repr=False)
    start: float
    end: float

    def opacity(self, t: float) -> float:
        """0 (absent) to 1 (wholly there) at time t."""
        rising, falling = (t - self.start) / _FADE + 0.5, (self.end - t) / _FADE + 0.5
        return max(0.0, min(1.0, rising, falling))


@dataclass(frozen=True, eq=False)
class StreamExample:
    """A video that is drawn when asked: `frame(t)` for any time, `frames(fps)` in order.

    Attributes:
        height, width: Px, multiples of 28.
        seconds: Length.
        numbers: What comes and goes, in order.
    """

    height: int
    width: int
    seconds: float
    numbers: tuple[Number, ...]
    _camera: Camera = field(repr=False)
    _paper: NDArray[np.float32] = field(repr=False)
    _ink: NDArray[np.float32] = field(repr=False)
    _grain: tuple[int, float] = field(repr=False)  # key of the noise, its deviation
    _sheets: dict[int | None, Image.Image] = field(repr=False, default_factory=dict)

    def times(self, fps: float = FPS) -> list[float]:
        """Times of the frames at `fps`, s: 0, 1/fps, ... before the end."""
        if not fps > 0:
            raise ValueError(f"fps is {fps}; it must be above 0.")
        return [k / fps for k in range(math.ceil(self.seconds * fps - 1e-9))]

    def frame(self, t: float) -> Image.Image:
        """The RGB picture at time t (s)."""
        sheet = self._sheet(t)
        affine = self._camera.affine(t)
        seen = sheet.transform((self.width, self.height), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        key, sigma = self._grain
        rng = np.random.default_rng([key, round(t * 10_000)])
        return grainy(np.asarray(seen), noise(self.height, self.width, rng), sigma)

    def frames(self, fps: float = FPS) -> Iterator[Image.Image]:
        """The frames at `fps`, one after the other, drawn as they are taken."""
        return (self.frame(t) for t in self.times(fps))

    def visible(self, t: float) -> Number | None:
        """The number that is there (more than half faded in) at time t, if any."""
        return next((number for number in self.numbers if number.opacity(t) > 0.5), None)

    def captions(self, fps: float = FPS) -> list[str]:
        """What each frame at `fps` newly shows: the number's text, or ""."""
        captions, last = [], None
        for t in self.times(fps):
            number = self.visible(t)
            captions.append(number.text if number is not None and number is not last else "")
            last = number or last
        return captions

    def glyphs(self, t: float) -> list[Glyph]:
        """The digits that are there at time t, their boxes in px of the frame."""
        number = self.visible(t)
        glyphs = () if number is None else number.glyphs
        return [replace(glyph, box=_box_in_frame(glyph.box, self._camera, t)) for glyph in glyphs]

    def _sheet(self, t: float) -> Image.Image:
        """The whole sheet with its ink at time t."""
        inked = [(index, n.opacity(t)) for index, n in enumerate(self.numbers) if n.opacity(t) > 0]
        whole = not inked or (len(inked) == 1 and inked[0][1] == 1)
        key = inked[0][0] if inked else None
        if whole and key in self._sheets:
            return self._sheets[key]
        alpha = np.zeros(self._paper.shape[1:], dtype=np.uint8)
        for index, opacity in inked:
            number = self.numbers[index]
            for glyph, ink in zip(number.glyphs, number.inks, strict=True):
                left, top, right, bottom = (int(v) for v in glyph.box)
                under = alpha[top:bottom, left:right]
                np.maximum(under, (ink * opacity).astype(np.uint8), out=under)
        sheet = compose(self._paper, alpha, self._ink, self._paper, 0.0)
        if whole:
            # frames come in order, so one sheet with ink and the bare one are enough
            for old in [k for k in self._sheets if k is not None and key is not None]:
                del self._sheets[old]
            self._sheets[key] = sheet
        return sheet


def stream(
    seed: int | np.random.Generator,
    split: Split = "train",
    *,
    seconds: float = 20.0,
    sizes: Sequence[tuple[int, int]] | None = None,
    max_side: int = MAX_SIDE,
    strength: Strength = None,
    follow: Follow | None = None,
) -> StreamExample:
    """Draws one stream.

    Args:
        seed, split, strength: As for `pages.page`.
        seconds: Length, 2 or more.
        sizes: (height, width) in px to choose from; by default both sides are drawn evenly from the multiples of 28 in
            224..`max_side`.
        max_side: px.
        follow: Draws each number; `next_number` by default.
    """
    if not seconds >= 2:
        raise ValueError(f"a stream of {seconds} s is too short; it needs 2 s or more.")
    rng = as_generator("stream", split, seed)
    bent = draw_strength(strength, split, rng)
    height, width = draw_size(rng, sizes, MIN_SIDE, MAX_SIDE, max_side)
    camera = Camera.draw(height, width, rng)
    hand = Hand.draw(rng)
    numbers: list[Number] = []
    for start, end in _times(seconds, rng):
        text = (follow or next_number)(numbers[-1].text if numbers else "", rng)
        numbers.append(_number(text, start, end, camera, hand, split, rng, bent))
    return StreamExample(
        height,
        width,
        float(seconds),
        tuple(numbers),
        camera,
        draw_paper(*camera.sheet_size, rng),
        ink_colour(rng),
        (int(rng.integers(2**40)), float(rng.uniform(1, 9))),
    )


def training_clip(rng: np.random.Generator, strength: Strength = None, follow: Follow | None = None) -> StreamExample:
    """A stream of the training split of 3 to 20 s; most are short and small, as pictures are what costs."""
    fewest, most = _SHORT if rng.random() < 0.8 else _LONG
    count = int(rng.integers(fewest, most + 1))
    low, high = MIN_SIDE, MAX_SIDE if count <= _SHORT[1] else (MIN_SIDE + MAX_SIDE) // 2
    height, width = (CELL * math.floor(low / CELL * ((high + CELL) / low) ** rng.random()) for _ in range(2))
    return stream(rng, "train", seconds=count / FPS, strength=strength, sizes=[(height, width)], follow=follow)


def _times(seconds: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """When each number appears and vanishes, s; changes keep clear of the multiples of half a second."""
    frames = math.ceil(seconds * FPS - 1e-9)
    spans = []
    first = int(rng.integers(0, 4))
    start = _before(first, rng)
    while first < frames:
        first += int(rng.integers(2, 8))  # stays 1 to 3.5 s
        end = _before(first, rng)
        spans.append((start, end))
        start = end
        if rng.random() < 0.6:
            first += int(rng.integers(1, 4))  # then 0.5 to 1.5 s of bare paper
            start = _before(first, rng)
    return spans


def _before(frame: int, rng: np.random.Generator) -> float:
    return (frame - rng.uniform(_CLEAR * FPS, 1 - _CLEAR * FPS)) / FPS


def next_number(previous: str, rng: np.random.Generator) -> str:
    """A number of 1 to 4 digits, other than the one before."""
    digits = rng.integers(0, 10, int(rng.choice(len(_DIGITS), p=_DIGITS)) + 1)
    while "".join(map(str, digits)) == previous:
        digits = rng.integers(0, 10, len(digits))
    return "".join(map(str, digits))


def _number(
    text: str,
    start: float,
    end: float,
    camera: Camera,
    hand: Hand,
    split: Split,
    rng: np.random.Generator,
    strength: float,
) -> Number:
    """Write a number where it stays in view from start to end."""
    digits = [int(digit) for digit in text]
    scans = [pick_scan(digit, split, rng) for digit in digits]
    largest = min(64.0, 0.4 * camera.height, 0.85 * camera.width / len(digits) / 0.9)
    size = _LEAST_HEIGHT * (max(largest, _LEAST_HEIGHT) / _LEAST_HEIGHT) ** rng.random()
    watched = np.arange(start, end + 0.1, 0.1)
    while True:
        inks = render_digits(scans, size * rng.uniform(0.97, 1.05, len(scans)), rng, hand, strength)
        for attempt in range(20):
            # the last attempt is the safest place: the middle of the view, half-way through
            aim = (0.5, 0.5) if attempt == 19 else rng.uniform(0.12, 0.88, 2)
            middle = camera.to_sheet(aim[0] * camera.width, aim[1] * camera.height, (start + end) / 2)
            glyphs = _set_out(digits, scans, inks, size, middle, rng)
            if all(_in_view(glyphs, camera, float(t)) for t in watched):
                return Number(text, glyphs, tuple(inks), start, end)
        size = max(_LEAST_HEIGHT, 0.85 * size)


def _set_out(
    digits: Sequence[int],
    scans: Sequence[int],
    inks: Sequence[NDArray[np.uint8]],
    size: float,
    middle: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Glyph, ...]:
    widths = [ink.shape[1] for ink in inks]
    gap = 2 + rng.uniform(0.05, 0.25) * size
    steps = [max(_LEAST_PITCH + 1, (before + after) / 2 + gap) for before, after in itertools.pairwise(widths)]
    offsets = np.concatenate([[0.0], np.cumsum(steps)])
    offsets -= offsets[-1] / 2
    glyphs = []
    for column, (digit, scan, ink, offset) in enumerate(zip(digits, scans, inks, offsets, strict=True), start=1):
        height, width = ink.shape
        left, top = round(middle[0] + offset - width / 2), round(middle[1] - height / 2)
        glyphs.append(Glyph(digit, scan, 1, column, (left, top, left + width, top + height)))
    return tuple(glyphs)


def _in_view(glyphs: Sequence[Glyph], camera: Camera, t: float) -> bool:
    first, last = (_box_in_frame(glyph.box, camera, t) for glyph in (glyphs[0], glyphs[-1]))
    right, bottom = max(first[2], last[2]), max(first[3], last[3])
    inside = right <= camera.width - _EDGE and bottom <= camera.height - _EDGE
    return inside and min(*first[:2], *last[:2]) >= _EDGE


def _box_in_frame(
    box: tuple[float, float, float, float], camera: Camera, t: float
) -> tuple[float, float, float, float]:
    # the roll is too small to matter for a single digit's box
    left, top, right, bottom = box
    x, y = camera.to_frame((left + right) / 2, (top + bottom) / 2, t)
    half_w, half_h = camera.scale(t) * (right - left) / 2, camera.scale(t) * (bottom - top) / 2
    return x - half_w, y - half_h, x + half_w, y + half_h
