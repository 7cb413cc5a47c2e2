"""Paper under handwriting: tint, shading, faint rules, specks, and the camera's noise.

Legend: paper, grain float32 (3, H, W), planes of colour; alpha uint8 (H, W); the result is an RGB picture.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_NOISE_SIDE = 1024


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
