"""What happens to a page before it is seen: turned, scaled, shadowed, blurred, compressed; its characters go along."""

from io import BytesIO

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from projects.casa_smol.canvas import Canvas, Glyphs


def placed(
    canvas: Canvas, size: tuple[int, int], rng: Generator, turned: float = 0.3
) -> tuple[Image.Image, Image.Image, Glyphs]:
    """A part of a page, of `size` (width, height): picture, ground, and characters where they now stand.

    turned: the share of pages that are turned by up to four degrees, sheared or scaled; the others are only cut out.
    """
    glyphs = canvas.found()
    room = np.array(canvas.size, dtype=np.float64) - size
    shift = rng.uniform(np.minimum(room, 0), np.maximum(room, 0)).round()
    if rng.random() >= turned:
        box = (int(shift[0]), int(shift[1]), int(shift[0]) + size[0], int(shift[1]) + size[1])
        return canvas.image.crop(box), canvas.ground.crop(box), _moved(glyphs, np.eye(2), -shift)
    angle = np.clip(rng.normal(0, 1.6), -4.0, 4.0) * np.pi / 180
    scale, shear = rng.uniform(0.82, 1.2), rng.normal(0, 0.02)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = scale * turn @ np.array([[1, shear], [0, 1]])
    middle = np.array(size) / 2
    offset = middle - forward @ (shift + middle)
    back = np.linalg.inv(forward)
    start = -back @ offset
    values = (back[0, 0], back[0, 1], start[0], back[1, 0], back[1, 1], start[1])
    image, ground = (
        part.transform(size, Image.Transform.AFFINE, values, how, fillcolor=canvas.paper)
        for part, how in ((canvas.image, Image.Resampling.BICUBIC), (canvas.ground, Image.Resampling.NEAREST))
    )
    return image, ground, _moved(glyphs, forward, offset)


def _moved(glyphs: Glyphs, forward: np.ndarray, offset: np.ndarray) -> Glyphs:
    """Centres go through the map; extents are scaled, for angles so small that boxes stay upright."""
    boxes = glyphs.boxes
    middles = np.stack([boxes[:, [0, 2]].mean(1), boxes[:, [1, 3]].mean(1)], axis=1) @ forward.T + offset
    scale = np.sqrt(abs(np.linalg.det(forward)))
    half = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], axis=1) * scale / 2
    reach = (glyphs.lines - boxes[:, [1, 3]].mean(1, keepdims=True)) * scale
    return Glyphs(
        np.concatenate([middles - half, middles + half], axis=1),
        middles[:, 1:] + reach,
        glyphs.classes,
        glyphs.words,
        glyphs.inks,
        glyphs.runs,
    )


def worn(image: Image.Image, rng: Generator, strength: float = 1.0) -> Image.Image:
    """A picture as scanners, cameras and screens hand it on; nothing moves. strength: 0 leaves it as it is."""

    def chance(share: float) -> bool:
        return bool(rng.random() < share * strength)

    if chance(0.12):
        factor = rng.uniform(0.62, 0.95)
        how = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
        small = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)
        image = small.resize(image.size, how)
    if chance(0.28):
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.25, 0.95)))
    elif chance(0.08):
        image = image.filter(ImageFilter.SHARPEN)
    if chance(0.4):
        image = Image.fromarray(_lit(np.asarray(image), rng))
    if chance(0.35):
        file = BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(22, 92)), subsampling=int(rng.integers(0, 3)))
        image = Image.open(file).convert("RGB")
    return image


def _lit(values: np.ndarray, rng: Generator) -> np.ndarray:
    """Light and noise: contrast, a tint, shadows across, grain."""
    height, width = values.shape[:2]
    found = values.astype(np.float32)
    if rng.random() < 0.5:
        low, high = rng.uniform(0, 60), rng.uniform(190, 255)
        found = low + found * ((high - low) / 255)
    if rng.random() < 0.3:
        found *= rng.uniform(0.82, 1.0, 3).astype(np.float32)
    if rng.random() < 0.45:
        # a shadow is a coarse field made smooth
        coarse = Image.fromarray(rng.uniform(0.5, 1.0, tuple(rng.integers(2, 5, 2))).astype(np.float32))
        found *= np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    if rng.random() < 0.6:
        grain = rng.standard_normal((height, width, 1 if rng.random() < 0.5 else 3), dtype=np.float32)
        found += grain * np.float32(rng.uniform(1, 13))
    return np.clip(found, 0, 255).astype(np.uint8)
