"""Handwriting: scikit-learn's 1,797 scanned digits, drawn as ink at any size, and the paper under it.

Legend: scan   uint8 (8, 8), ink 0..16      one digit written by one person
        master uint8 (96, 96), ink 0..240   the scan, 8x, with two empty pixels around it before enlarging
        alpha  uint8 (height, width)        0 bare paper .. 255 full ink, cropped to the ink
        n      digits drawn in one call; h, w the canvas that each is drawn on
        paper, grain float32 (3, H, W), planes of colour

Scans 0..1399 are for training, the rest for evaluation only. The writers of the two parts differ, so what
limits a reader is how well it takes to new hands: training may bend and press the strokes further
(`strength`) than real scans are, and lead each scan towards one of its kin or away from it: the scans of the same
digit that look most like it. Such a digit was written by nobody, and is still that digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from casa.errors import UserError
from casa.evaluation.example import Split

FIRST_HELD_OUT = 1400

_ENLARGE = 8
_BORDER = 2
_SIDE = (8 + 2 * _BORDER) * _ENLARGE
_KNOTS = 4  # strokes are bent and pressed by smooth fields with 4 x 4 knots
_KIN = 12  # per scan
_TOWARDS = (-0.4, 0.6)  # share of the way from a scan to its kin
_INKED = 40  # alpha above which a pixel counts as ink when the digit is cropped
_NOISE_SIDE = 1024


Strength = float | tuple[float, float] | None
"""How far strokes are bent: a number, the least and greatest to draw one from, or None for what the split has."""


@dataclass(frozen=True)
class Hand:
    """How one writer writes; each digit varies a little around it.

    Attributes:
        slant: Shear, positive leans right.
        stretch: Width over natural width.
        threshold: Share of full ink below which paper stays bare (a high one makes thin strokes).
        sharpness: How fast ink rises above it.
    """

    slant: float = 0.0
    stretch: float = 1.0
    threshold: float = 0.25
    sharpness: float = 1.8

    @staticmethod
    def draw(rng: np.random.Generator) -> "Hand":
        slant, stretch, threshold, sharpness = rng.random(4)
        return Hand(
            slant=-0.12 + 0.36 * slant,
            stretch=0.82 + 0.36 * stretch,
            threshold=0.17 + 0.15 * threshold,
            sharpness=1.4 + 0.9 * sharpness,
        )


def draw_strength(strength: Strength, split: Split, rng: np.random.Generator) -> float:
    """The strength of one example: by default 0 for held-out writers and, for training, anything up to 1.5.

    Real writers differ from those of the training scans by more than the scans among themselves.
    """
    if strength is None:
        strength = (0.0, 1.5) if split == "train" else 0.0
    return float(rng.uniform(*strength)) if isinstance(strength, tuple) else strength


@cache
def load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All scans, uint8 (1797, 8, 8) with ink 0..16, and their digits, int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The tasks need scikit-learn's digits: pip install 'casa-vlm[tasks]'.") from error
    flat, digits = load_digits(return_X_y=True)
    return np.asarray(flat, dtype=np.uint8).reshape(-1, 8, 8), np.asarray(digits, dtype=np.int64)


@cache
def scan_indices(split: Split, digit: int) -> NDArray[np.int64]:
    """Indices of the split's scans of one digit."""
    _, digits = load_scans()
    indices = np.flatnonzero(digits == digit)
    return indices[indices < FIRST_HELD_OUT] if split == "train" else indices[indices >= FIRST_HELD_OUT]


def pick_scan(digit: int, split: Split, rng: np.random.Generator) -> int:
    """Index of a random scan of `digit` from the split."""
    indices = scan_indices(split, digit)
    return int(indices[rng.integers(len(indices))])


def _mitchell(x: NDArray[np.floating]) -> NDArray[np.float64]:
    # Mitchell and Netravali's cubic: bicubic interpolation shows the 8 x 8 grid as stairs, this does not
    x = np.abs(x)
    near = (7 * x**3 - 12 * x**2 + 16 / 3) / 6
    far = (-7 / 3 * x**3 + 12 * x**2 - 20 * x + 32 / 3) / 6
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@cache
def _masters() -> NDArray[np.uint8]:
    scans, _ = load_scans()
    padded = np.pad(scans.astype(np.float32), ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
    at = (np.arange(_SIDE) + 0.5) / _ENLARGE - 0.5
    weights = _mitchell(at[:, None] - np.arange(padded.shape[1])[None, :]).astype(np.float32)
    enlarged = weights @ padded @ weights.T
    return np.clip(np.rint(enlarged * 15), 0, 255).astype(np.uint8)


@cache
def _kin() -> NDArray[np.int64]:
    """Per scan the scans of the same digit and split that differ least from it, int64 (1797, 12)."""
    scans, _ = load_scans()
    flat = scans.reshape(len(scans), -1).astype(np.float32)
    kin = np.empty((len(scans), _KIN), dtype=np.int64)
    for split in ("train", "held_out"):
        for digit in range(10):
            members = scan_indices(split, digit)
            apart = np.square(flat[members, None] - flat[None, members]).sum(-1)
            np.fill_diagonal(apart, np.inf)
            kin[members] = members[np.argsort(apart, axis=1, kind="stable")[:, :_KIN]]
    return kin


def render_digits(
    scans: Sequence[int] | NDArray[np.int64],
    heights: Sequence[float] | NDArray[np.float64],
    rng: np.random.Generator,
    hand: Hand | None = None,
    strength: float = 0.0,
) -> list[NDArray[np.uint8]]:
    """Draws scans by number; together they are several times faster than one by one.

    Args:
        scans: Numbers of scans, one for each digit.
        heights: About how high each digit is, in px.
        rng: What all is drawn from.
        hand: The writer's style; drawn anew if None.
        strength: 0 leaves the scans' strokes as they are (slanted, turned and stretched); 1 also mixes them with their
            kin, bends them, presses them unevenly and varies their thickness.

    Returns:
        An alpha for each digit, uint8 (height, width).
    """
    if len(scans) == 0:
        return []
    hand = hand or Hand.draw(rng)
    number = np.asarray(scans)
    size = np.asarray(heights, dtype=np.float32)
    h, w = int(size.max() * 1.3) + 4, int(size.max() * 1.4) + 4
    jitter = np.clip(rng.standard_normal((len(number), 6), dtype=np.float32), -2.5, 2.5)
    a, b, c, d, e, f = _affine(hand, size, h, w, jitter, strength)
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    across = a * x + c + b * y
    down = d * x + f + e * y
    if strength > 0:
        across += _field(rng, len(number), h, w, 2.5 * strength)
        down += _field(rng, len(number), h, w, 2.5 * strength)
    np.clip(across, 0, _SIDE - 1, out=across)
    np.clip(down, 0, _SIDE - 1, out=down)
    # the master is finer than any digit drawn from it, so that the nearest pixel will do
    index = down.astype(np.int32)
    index *= _SIDE
    index += across.astype(np.int32)
    index += (number * _SIDE**2).astype(np.int32)[:, None, None]
    ink = _masters().reshape(-1).take(index).astype(np.float32)
    if strength > 0:
        share = strength * rng.uniform(*_TOWARDS, len(number)).astype(np.float32)[:, None, None]
        kin = _kin()[number, rng.integers(_KIN, size=len(number))]
        index += ((kin - number) * _SIDE**2).astype(np.int32)[:, None, None]
        ink += share * (_masters().reshape(-1).take(index) - ink)
        ink *= 1 + np.clip(_field(rng, len(number), h, w, 0.15 * strength), -0.3, 0.3)
    threshold = np.clip(hand.threshold + (0.01 + 0.03 * strength) * jitter[:, 4], 0.1, 0.36)
    ink *= hand.sharpness * 255 / 240
    ink -= (hand.sharpness * 255 * threshold)[:, None, None]
    np.clip(ink, 0, 255, out=ink)
    return _crop(ink.astype(np.uint8))


def _affine(
    hand: Hand, size: NDArray[np.float32], h: int, w: int, jitter: NDArray[np.float32], strength: float
) -> tuple[NDArray[np.float32], ...]:
    """Canvas to master, per digit: across = a x + b y + c, down = d x + e y + f; each float32 (n, 1, 1)."""
    turn = np.radians((2.5 + 1.5 * strength) * jitter[:, 0])
    shear = hand.slant + (0.04 + 0.04 * strength) * jitter[:, 1]
    wide = hand.stretch * np.exp((0.04 + 0.06 * strength) * jitter[:, 2])
    tall = np.exp((0.02 + 0.03 * strength) * jitter[:, 3])
    scale = 8 * _ENLARGE / size
    cos, sin = np.cos(turn), np.sin(turn)
    # undo the turn, then the slant, then the stretch
    a, b = (cos - shear * sin) * scale / wide, (sin + shear * cos) * scale / wide
    d, e = -sin * scale / tall, cos * scale / tall
    # + 0.5 turns the truncation to whole pixels into rounding
    c, f = _SIDE / 2 + 0.5 - a * w / 2 - b * h / 2, _SIDE / 2 + 0.5 - d * w / 2 - e * h / 2
    return tuple(value.astype(np.float32)[:, None, None] for value in (a, b, c, d, e, f))


def _field(rng: np.random.Generator, n: int, h: int, w: int, deviation: float) -> NDArray[np.float32]:
    """Smooth random fields, float32 (n, h, w), with the given deviation at the knots."""
    knots = np.clip(rng.standard_normal((n, _KNOTS, _KNOTS), dtype=np.float32), -2, 2) * np.float32(deviation)
    return (_spread(h) @ knots @ _spread(w).T).astype(np.float32, copy=False)


@cache
def _spread(length: int) -> NDArray[np.float32]:
    # weights of the knots at each pixel; rows sum to one
    at = np.arange(length) * ((_KNOTS - 1) / (length - 1))
    weights = _mitchell(at[:, None] - np.arange(_KNOTS)[None, :])
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _crop(alphas: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    inked: NDArray[np.bool_] = np.greater(alphas, _INKED)
    rows, columns = np.any(inked, axis=2), np.any(inked, axis=1)
    top, left = np.argmax(rows, axis=1), np.argmax(columns, axis=1)
    bottom = rows.shape[1] - np.argmax(rows[:, ::-1], axis=1)
    right = columns.shape[1] - np.argmax(columns[:, ::-1], axis=1)
    return [alpha[t:b, m:r] for alpha, t, b, m, r in zip(alphas, top, bottom, left, right, strict=True)]


@cache
def _noise_bank() -> NDArray[np.float32]:
    # drawing fresh noise would cost more than everything else on a page; a random crop of this is as good
    rng = np.random.default_rng(20251222)
    grey = rng.standard_normal((1, _NOISE_SIDE, _NOISE_SIDE), dtype=np.float32)
    colour = rng.standard_normal((3, _NOISE_SIDE, _NOISE_SIDE), dtype=np.float32)
    return (0.85 * grey + 0.5 * colour).astype(np.float32)


def noise(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Sensor noise of standard deviation about 1: float32 (3, height, width), sides up to 1024 px."""
    if max(height, width) > _NOISE_SIDE:
        raise ValueError(f"noise covers at most {_NOISE_SIDE} px; {height} x {width} was asked for.")
    y, x = rng.integers(0, (_NOISE_SIDE - height + 1, _NOISE_SIDE - width + 1))
    return _noise_bank()[:, y : y + height, x : x + width]


def ink_colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A dark ink: black, blue-black or blue; float32 (3,)."""
    base = np.array([(30, 30, 34), (25, 35, 90), (60, 40, 40)], dtype=np.float32)[rng.integers(3)]
    return base + rng.uniform(-15, 25, 3).astype(np.float32)


def draw_paper(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Light paper with gentle shading, sometimes faint rules and specks: float32 (3, height, width)."""
    tint = np.clip(rng.uniform(205, 250) + rng.uniform(-12, 6, 3), 0, 255).astype(np.float32)
    coarse = Image.fromarray(rng.uniform(-14, 14, (3, 3)).astype(np.float32))
    shade = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    if rng.random() < 0.3:
        step = int(rng.integers(18, 60))
        start = int(rng.integers(step))
        shade[start::step] -= rng.uniform(6, 26)
        if rng.random() < 0.3:
            shade[:, start::step] -= rng.uniform(6, 26)
    if rng.random() < 0.5:
        count = int(rng.integers(1, 3 + height * width // 8000))
        ys, xs = rng.integers(0, height - 1, count), rng.integers(0, width - 1, count)
        dark = rng.uniform(30, 110, count).astype(np.float32)
        shade[ys, xs] -= dark
        shade[ys + 1, xs] -= 0.5 * dark
    return shade + tint[:, None, None]


def on_paper(alpha: NDArray[np.uint8], rng: np.random.Generator) -> Image.Image:
    """Writing, alpha (H, W), in some ink on some paper."""
    height, width = alpha.shape
    sigma = rng.uniform(1, 13)
    return compose(draw_paper(height, width, rng), alpha, ink_colour(rng), noise(height, width, rng), sigma)


def compose(
    paper: NDArray[np.float32],
    alpha: NDArray[np.uint8],
    ink: NDArray[np.float32],
    grain: NDArray[np.float32],
    sigma: float,
) -> Image.Image:
    """Lay ink (float32 (3,)) on paper and add `sigma` times `grain`: an RGB picture."""
    share = alpha * np.float32(1 / 255)
    picture = np.empty((*alpha.shape, 3), dtype=np.uint8)
    for channel in range(3):
        plane = ink[channel] - paper[channel]
        plane *= share
        plane += paper[channel]
        plane += grain[channel] * np.float32(sigma)
        np.clip(plane, 0, 255, out=plane)
        picture[:, :, channel] = plane
    return Image.fromarray(picture)


def grainy(picture: NDArray[np.uint8], grain: NDArray[np.float32], sigma: float) -> Image.Image:
    """Add `sigma` times `grain` (3, H, W) to an RGB picture, uint8 (H, W, 3)."""
    noisy = np.empty_like(picture)
    for channel in range(3):
        plane = grain[channel] * np.float32(sigma)
        plane += picture[:, :, channel]
        np.clip(plane, 0, 255, out=plane)
        noisy[:, :, channel] = plane
    return Image.fromarray(noisy)
