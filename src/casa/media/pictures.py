"""Pictures in, by one door: whatever a caller has becomes an upright RGB picture, or one plain sentence saying why not.

    path, bytes, open file, address  ->  decoded  -.
    PIL picture of any mode          --------------+->  upright  ->  8 bits  ->  over white  ->  RGB
    array or tensor, HWC or CHW      --------------'

Sizes are read from the header and refused before anything is decoded. Shapes: H, W pixels, C channels.
"""

import base64
import binascii
import http.client
import os
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, cast
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from casa.errors import UserError

# 8192 x 8192. Below half of Pillow's own limit, so that ours is always the one that speaks.
MAX_PIXELS = 64 * 1024 * 1024
# Vision towers of the Qwen-VL family refuse pictures more elongated than this.
MAX_ASPECT = 200
# Of a picture fetched from the web.
MAX_BYTES = 128 * 1024 * 1024
FETCH_SECONDS = 60.0
# Named one by one: Pillow also opens EPS, for which it would run Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Of floats, a quarter of one of 255 steps: as far as arithmetic may lead beyond black and white.
ROUNDING = 1e-3
HEAD_BYTES = 4096  # of a file, by which its kind is known

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
# What makes a picture of an EXIF orientation upright; from 5 on, width and height change places.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAGS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow keeps an orientation
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "AAAA")  # how pictures in base64 begin

Channels = Literal["first", "last"]
PathOrFile = str | os.PathLike[str] | BinaryIO


def as_picture(given: object, name: str = "The picture", channels: Channels | None = None) -> Image.Image:
    """The one door: any form of picture as a PIL image of mode RGB, upright. One that is so already comes back itself.

    EXIF orientation is applied, transparency laid over white, and what has more bits scaled to 8. Of an animation the
    first frame is taken; of one that was opened, the frame at hand.

    Args:
        given: A PIL image of any mode, a path, an open binary file, the bytes of a file, a data: address, an http(s)
            address (which is fetched), or the bare base64 of a file; an array or tensor (H, W), (H, W, C) or
            (C, H, W), with C 1, 3 or 4, or last 2 for grey with transparency. Values are bool; uint8; uint16 from 0 to
            65535; other whole numbers from 0 to 255, or from 0 to 65535 if one is above 255; floats from 0 to 1 if
            none is above 1, else from 0 to 255.
        name: How sentences call what has no name of its own.
        channels: Decides where both could be meant; left out, they are last in NumPy's arrays and first in torch's.

    Raises:
        UserError: There is no such file, it is damaged, no picture, or too large (`open_picture`); an array has
            another shape, or values that could mean two things: not finite, negative, or floats that end between 1
            and 2.
        TypeError: Anything else is given.
    """
    if isinstance(given, Image.Image):
        _check_size(given.size, name)
        is_closed = getattr(given, "fp", given) is None
        try:
            return _upright_rgb(given, name)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # an opened file is decoded only now
            if is_closed or "closed" in str(error):
                raise UserError(f"{name} was closed before it was read: use it while it is open.") from error
            raise UserError(_damaged(name)) from error
    if isinstance(given, str):
        given = _located(given)
    if isinstance(given, (bytes, bytearray, memoryview)):
        given = BytesIO(given)
    if isinstance(given, (str, os.PathLike)) or hasattr(given, "read"):
        return picture_from(cast(PathOrFile, given), name)
    usual: Channels = "last"
    if (detach := getattr(given, "detach", None)) is not None:
        # torch's: bfloat16 has no NumPy twin, and a GPU's memory is not NumPy's
        tensor = detach().cpu()
        given = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        usual = "first"
    if hasattr(given, "__array__"):
        return _of_array(np.asarray(given), name, channels, usual)
    raise TypeError(f"{name} is of type {type(given).__name__}: give a PIL image, an array, a path or bytes.")


def open_picture(path_or_file: PathOrFile) -> Image.Image:
    """Reads a picture from a path or an open binary file: PIL image, mode RGB, upright, fully decoded.

    The content counts, not the file's name; all else as `as_picture` says.

    Raises:
        UserError: There is no such file; it is a directory, empty, cut off, not a picture, has more than `MAX_PIXELS`
            pixels, or one side over `MAX_ASPECT` times the other.
        TypeError: Neither a path nor a binary file is given.
    """
    # Pillow warns about large pictures, and about small damage that the sentences below report anyway.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return picture_from(path_or_file)


def picture_from(path_or_file: PathOrFile, name: str = "The picture") -> Image.Image:
    """`open_picture`, with Python's warnings left alone, for threads.

    Warnings are of the whole process: of several threads that each turn them off and on, none knows what it turns them
    on to. `name` is how sentences call a file without one.
    """
    with _opened(path_or_file, name) as (image, name):
        found = _upright_rgb(image, name)
        # what Pillow's reader of the format knows is left behind with the file
        return found.copy() if found is image else found


def picture_size(path_or_file: PathOrFile) -> tuple[int, int]:
    """Width and height in px of what `open_picture` would give, from the file's header alone.

    Raises what `open_picture` raises, as far as the header tells.
    """
    with _opened(path_or_file, "The picture") as (image, _):
        width, height = image.size
        # a TIFF's size is turned already; a PNG without tags in its header would be decoded to look for them behind
        has_tags = image.format != "TIFF" and (image.format != "PNG" or any(tag in image.info for tag in _TAGS))
        return (height, width) if has_tags and _orientation(image) in (5, 6, 7, 8) else (width, height)


def check_picture(image: Image.Image | np.ndarray, name: str = "The picture") -> Image.Image:
    """A frame handed over by a caller, through the same door: a PIL image of mode RGB, upright, never the caller's own.

    Args:
        image: A PIL image of any mode, or a uint8 array (H, W, 3) with channels red, green, blue.
        name: How sentences call it.

    Raises:
        TypeError: Anything else is given; a path is to be opened with `open_picture`.
        UserError: An array has another shape or dtype, or a size that `open_picture` would refuse too.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"{name} is an array of {image.dtype}: give uint8 values from 0 to 255.")
        if image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{name} is an array of shape {image.shape}: give (height, width, 3).")
    elif not isinstance(image, Image.Image):
        raise TypeError(
            f"{name} is a {type(image).__name__}: give a PIL image or a uint8 array (H, W, 3)"
            + (", or read the file with open_picture." if isinstance(image, (str, os.PathLike)) else ".")
        )
    found = as_picture(image, name, "last")
    return found.copy() if found is image else found


def over_white(image: Image.Image) -> Image.Image:
    """A picture with transparency, of any mode, laid over white; mode RGB."""
    # Pillow leads no other way out of the mode La
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), in another size: uint8 (height, width, 3). Itself, if it has that size."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def data_bytes(address: str) -> bytes:
    """What a data: address holds, in base64 (broken into lines or not) or percent-encoded. Raises UserError."""
    head, comma, body = address.partition(",")
    if not comma:
        raise UserError("A data: URI has no comma: write data:image/png;base64,...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(b"".join(unquote_to_bytes(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("A data: URI holds no valid base64: encode the picture again.") from error


def read_head(path: str | os.PathLike[str], kind: str) -> bytes:
    """The first bytes of the file at `path`; `kind` ("picture", "video") is how the sentences call it.

    Raises:
        UserError: Nothing is there, a directory, a pipe or device, an empty file, or no right to read it.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise UserError(f"There is no file {path}: check the name of the {kind}.")
        if file.is_dir():
            raise UserError(f"{path} is a directory: name one {kind} file inside it.")
        if not file.is_file():
            raise UserError(f"{path} is not a regular file: save the {kind} to a file first.")
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if not head:
        raise UserError(f"{path} is empty: copy or download the {kind} again.")
    return head


def looks_like_text(head: bytes) -> bool:
    """Whether the first bytes of a file are plain text: UTF-8 without any zero byte.

    The cut at `HEAD_BYTES` may fall inside one character, so an incomplete last one is forgiven.
    """
    if b"\0" in head or head.startswith((b"YUV4MPEG2", b"GIF8")):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) == HEAD_BYTES and error.start >= len(head) - 3
    return True


def is_heic(head: bytes) -> bool:
    """Whether a file that begins so is a HEIC picture, or a row of them, as iPhones take them."""
    # AVIF is of the same family, and may only say so among the brands behind the first
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC and b"avif" not in head[16 : int.from_bytes(head[:4], "big")]


def _located(given: str) -> str | bytes:
    """The path that a text names, or the bytes that it stands for."""
    start = given[:8].lower()
    if start.startswith("data:"):
        return data_bytes(given)
    if start.startswith(("http://", "https://")):
        return _fetched(given)
    if start.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(given[7:]))
    if given.startswith(_BASE64) and not os.path.exists(given):
        with suppress(binascii.Error, ValueError):
            return base64.b64decode("".join(given.split()), validate=True)
    return given


def _fetched(address: str) -> bytes:
    try:
        request = urllib.request.Request(address, headers={"Accept": "image/*", "User-Agent": "casa"})
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{address} cannot be fetched ({error}): check it, or download the picture.") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{address} has more than {MAX_BYTES // 2**20} MiB: make the picture smaller first.")
    return data


@contextmanager
def _opened(path_or_file: PathOrFile, name: str) -> Iterator[tuple[Image.Image, str]]:
    """A file whose header was read, and its name; what goes wrong inside becomes a sentence."""
    if isinstance(path_or_file, (str, os.PathLike)):
        head = read_head(path_or_file, "picture")
        name = str(path_or_file)
    elif hasattr(path_or_file, "read"):
        head = _head(path_or_file)
        given = getattr(path_or_file, "name", None)
        name = given if isinstance(given, str) else name
    else:
        raise TypeError(f"open_picture takes a path or a binary file, not {type(path_or_file).__name__}")
    formats = FORMATS
    if is_heic(head):
        _learn_heic(name)
        formats = (*FORMATS, "HEIF")
    try:
        with Image.open(path_or_file, formats=formats) as image:
            _check_size(image.size, name)
            yield image, name
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(_too_many_pixels(name)) from error
    except UnidentifiedImageError as error:
        if not head:
            raise UserError(f"{name} is empty: copy or download the picture again.") from error
        if isinstance(path_or_file, (str, os.PathLike)) and looks_like_text(head):
            raise UserError(f"{name} is a text file, not a picture: name a picture file.") from error
        raise UserError(
            f"{name} cannot be read as a picture, or its beginning is damaged: save it as PNG or JPEG."
        ) from error
    # a damaged header can make a decoder raise nearly anything
    except Exception as error:
        raise UserError(_damaged(name)) from error


def _head(file: BinaryIO) -> bytes:
    """The first bytes of an open file, which then stands at its beginning; "?" of one that cannot go back."""
    try:
        file.seek(0)  # where Pillow begins to read, too
        head = file.read(HEAD_BYTES)
        file.seek(0)
    except (OSError, AttributeError):
        return b"?"
    return head


def _learn_heic(name: str) -> None:
    """Has Pillow read HEIC from now on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UserError(f"{name} is a HEIC picture: install casa-vlm[heic], or save it as JPEG.") from error
    register_heif_opener()


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    # formats such as JPEG 2000 and GIF may only now tell their real size
    _check_size(image.size, name)
    if (turn := _TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
        for tag in _TAGS:  # so that nothing is turned twice
            image.info.pop(tag, None)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    if image.has_transparency_data:
        return over_white(image)
    if image.mode == "LAB":
        raise UserError(f"{name} has colours of the mode LAB: save it as RGB.")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF data says nothing about the picture, which is whole
        return 1


def _of_array(values: np.ndarray, name: str, channels: Channels | None, usual: Channels) -> Image.Image:
    shape = values.shape
    first = len(shape) == 3 and shape[0] in (1, 3, 4) and channels != "last"
    last = len(shape) == 3 and shape[2] in (1, 2, 3, 4) and channels != "first"
    if not (first or last or len(shape) == 2):
        raise UserError(f"{name} is an array of shape {shape}: give (height, width, 3) or (3, height, width).")
    if first and not (last and usual == "last"):
        values = values.transpose(1, 2, 0)
    _check_size((values.shape[1], values.shape[0]), name)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return _upright_rgb(Image.fromarray(np.ascontiguousarray(_eight_bits(values, name))), name)


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Values in any of the scales that `as_picture` takes, as uint8."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf":
        raise UserError(f"{name} is an array of {values.dtype}: give numbers, best uint8 from 0 to 255.")
    low, high = values.min(), values.max()
    fits, slack = True, 0.0
    if kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise UserError(f"{name} has values that are not finite: give floats from 0 to 1, or uint8 from 0 to 255.")
        full = 1.0 if high <= 1 + ROUNDING else 255.0
        # what overshoots white a little would be nearly black on the other scale
        fits, slack = full == 1.0 or high >= 2, full * ROUNDING
        wanted = "floats from 0 to 1 or from 0 to 255"
    else:
        full = 65535.0 if (kind == "u" and values.itemsize == 2) or high > 255 else 255.0
        wanted = "uint8 from 0 to 255 or uint16 from 0 to 65535"
    if not fits or low < -slack or high > full + slack:
        raise UserError(f"{name} has values from {low:g} to {high:g}, which may mean anything: give {wanted}.")
    return np.rint(values.astype(np.float64).clip(0, full) * (255.0 / full)).astype(np.uint8)


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
