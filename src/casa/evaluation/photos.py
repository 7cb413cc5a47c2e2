"""Real photographs as backgrounds: those that lie inside scikit-image's wheel, so that nothing is downloaded.

Legend: photo uint8 (H, W, 3). Training and evaluation use different photographs.
"""

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from casa.errors import UserError
from casa.evaluation.example import Split

PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "retina.jpg",
        "rocket.jpg",
        "camera.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "brick.png",
        "grass.png",
        "moon.png",
    ),
    "held_out": ("coffee.png", "motorcycle_left.png", "chelsea.png", "gravel.png"),
}

_LONGEST = 800  # px kept of the longer side: crops never need more


@cache
def _photo(name: str) -> Image.Image:
    try:
        import skimage
    except ImportError as error:
        raise UserError("The scenes need scikit-image's photographs: pip install 'casa-vlm[tasks]'.") from error
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise UserError(f"This scikit-image has no {name}; install scikit-image 0.24 or later.")
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((_LONGEST, _LONGEST))
    return photo


def photo_crop(height: int, width: int, split: Split, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random crop of one of the split's photographs, in varied light: (height, width, 3)."""
    names = PHOTOS[split]
    photo = _photo(names[rng.integers(len(names))])
    # shown at 0.6 to 1.6 times its size, or larger where it would not cover the picture
    largest = min(photo.width / width, photo.height / height)
    share = min(largest, rng.uniform(0.6, 1.6))
    # min: rounding must not reach past the photograph's edge
    w, h = min(share * width, photo.width), min(share * height, photo.height)
    x, y = rng.random() * (photo.width - w), rng.random() * (photo.height - h)
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, bias = rng.uniform(0.6, 1.05), rng.uniform(-15, 35)
    light = np.clip(np.arange(256) * gain + bias, 0, 255).astype(np.uint8)
    return light[np.asarray(crop)]
