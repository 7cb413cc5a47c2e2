"""Pictures in: any file Pillow reads becomes one upright RGB picture, or one plain sentence saying why not.

Sizes are read from the header and refused before anything is decoded.
"""

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from casa.errors import UserError
from casa.media.sniff import looks_like_text, read_head

# 8192 x 8192. Below half of Pillow's own limit, so that ours is always the one that speaks.
MAX_PIXELS = 64 * 1024 * 1024
# Vision towers of the Qwen-VL family refuse pictures more elongated than this.
MAX_ASPECT = 200
# Named one by one: Pillow also opens EPS, for which it would run Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


def open_picture(path_or_file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Read a picture from a path or an open binary file: PIL image, mode RGB, upright, fully decoded.

    EXIF orientation is applied, transparency is laid over white, grey, 16-bit, palette and CMYK become
    8-bit RGB, and of an animation the first frame is taken. The content counts, not the file's name.

    Raises:
        UserError: no such file, a directory, empty, cut off, not a picture, more than `MAX_PIXELS`
            pixels, or one side over `MAX_ASPECT` times the other.
        TypeError: neither a path nor a binary file.
    """
    # Pillow warns about large pictures, and about small damage that the sentences below report anyway.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return picture_from(path_or_file)


def picture_from(path_or_file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """`open_picture`, with Python's warnings left alone: they are of the whole process, so that of several threads that
    each turn them off and on, none knows what it turns them on to.
    """
    if isinstance(path_or_file, (str, os.PathLike)):
        head = read_head(path_or_file, "picture")
        name = str(path_or_file)
    elif hasattr(path_or_file, "read"):
        head = b""
        given = getattr(path_or_file, "name", None)
        name = given if isinstance(given, str) else "The picture"
    else:
        raise TypeError(f"open_picture takes a path or a binary file, not {type(path_or_file).__name__}")

    try:
        with Image.open(path_or_file, formats=FORMATS) as image:
            _check_size(image.size, name)
            return _decode(image, name)
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(_too_many_pixels(name)) from error
    except UnidentifiedImageError as error:
        if head and looks_like_text(head):
            raise UserError(f"{name} is a text file, not a picture: name a picture file.") from error
        if not head and _is_empty(path_or_file):
            raise UserError(f"{name} is empty: copy or download the picture again.") from error
        raise UserError(
            f"{name} is no picture that can be read, or its beginning is damaged: save it as PNG or JPEG."
        ) from error
    # a damaged header can make a decoder raise nearly anything
    except Exception as error:
        raise UserError(_damaged(name)) from error


def check_picture(image: Image.Image | np.ndarray, name: str = "The picture") -> Image.Image:
    """A picture handed over by a caller, as a PIL image of mode RGB, upright.

    Takes a PIL image of any mode, or a uint8 array (H, W, 3) with channels red, green, blue.

    Raises:
        TypeError: anything else; a path is to be opened with `open_picture`.
        ValueError: an array of another shape or dtype, or a size that `open_picture` would refuse too.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"{name} is an array of {image.dtype}: give uint8 values from 0 to 255.")
        if image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{name} is an array of shape {image.shape}: give (height, width, 3).")
        _check_size((image.shape[1], image.shape[0]), name)
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        _check_size(image.size, name)
        try:
            return _decode(image, name)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # an opened file is decoded only now
            raise UserError(_damaged(name)) from error
    raise TypeError(
        f"{name} is a {type(image).__name__}: give a PIL image or a uint8 array (H, W, 3)"
        + (", or read the file with open_picture." if isinstance(image, (str, os.PathLike)) else ".")
    )


def over_white(image: Image.Image) -> Image.Image:
    """A picture with transparency, of any mode, laid over white; mode RGB."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _decode(image: Image.Image, name: str) -> Image.Image:
    image.load()
    # formats such as JPEG 2000 and GIF may only now tell their real size
    _check_size(image.size, name)
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data says nothing about the picture, which is whole
        upright = image
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        return _eight_bits(upright).convert("RGB")
    if upright.has_transparency_data:
        return over_white(upright)
    return upright.copy() if upright.mode == "RGB" else upright.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits (integer or float), scaled to 0..255; Pillow would clip it to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = values.max()
    full = max(65535.0, peak)
    if image.mode == "F":
        # floats have no agreed white: 1.0 and 255 are the two in use
        full = 1.0 if peak <= 1.0 else max(255.0, peak)
    return Image.fromarray(np.rint(values.clip(0, full) * (255.0 / full)).astype(np.uint8))


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(width, height) < 1:
        raise UserError(f"{name} has a size of {width} x {height}: give a picture with at least one pixel.")
    if width * height > MAX_PIXELS:
        raise UserError(_too_many_pixels(name, f" ({width} x {height})"))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{name} is {width} x {height}, longer than {MAX_ASPECT} times its width: crop it.")


def _too_many_pixels(name: str, size: str = "") -> str:
    return f"{name} has more than {MAX_PIXELS // 2**20} megapixels{size}: make it smaller first."


def _damaged(name: str) -> str:
    return f"{name} is damaged or cut off: copy or download the picture again."


def _is_empty(file: object) -> bool:
    try:
        file.seek(0)  # pyright: ignore[reportAttributeAccessIssue]
        return not file.read(1)  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, AttributeError):
        return False
