"""Pictures from outside: encoded bytes, data: addresses and, where allowed, web addresses become RGB pictures in size.

Format and size are read from the first bytes; what is too large or no picture is refused before it is decoded. Threads
read side by side, none waits for another's picture.
"""

import base64
import binascii
import math
import warnings
from dataclasses import replace
from io import BytesIO

from PIL import Image

from casa.errors import UserError
from casa.media.pictures import picture_from
from casa.serving.fetch import fetch
from casa.serving.limits import Limits


def keep_pillow_quiet() -> None:
    """Has Python leave out Pillow's warnings, for the whole process: every picture that a client sends could bring new
    ones. What is too large or damaged is refused in words.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_frame(data: bytes, limits: Limits) -> Image.Image:
    """`read_picture` for a frame of a stream, which has at most `limits.frame_pixels`."""
    return read_picture(data, replace(limits, decoded_pixels=min(limits.frame_pixels, limits.decoded_pixels)))


def read_picture(data: bytes, limits: Limits) -> Image.Image:
    """An encoded JPEG, PNG or WebP as an upright RGB picture of at most `limits.picture_pixels`.

    Raises UserError for anything else, and for more than `limits.decoded_pixels`. Any thread may call it.
    """
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if not (data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or is_webp):
        raise UserError("this is no JPEG, PNG or WebP picture; encode the frame as one of them.")
    width, height = _size(data)
    if width * height > limits.decoded_pixels:
        raise UserError(
            f"the picture is {width} x {height}, but this server takes at most "
            f"{limits.decoded_pixels / 1e6:g} million pixels; make it smaller first."
        )
    picture = picture_from(BytesIO(data))
    scale = math.sqrt(limits.picture_pixels / (picture.width * picture.height))
    if scale < 1:
        size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def read_address(address: str, limits: Limits, allow_fetch: bool) -> Image.Image:
    """The picture behind a data: address, or behind http(s) if fetching is allowed. Raises UserError otherwise."""
    scheme = address[:8].split(":", 1)[0].lower()
    if scheme == "data":
        return read_picture(_inline(address), limits)
    if scheme in ("http", "https"):
        if not allow_fetch:
            raise UserError("this server does not fetch pictures; send them as data: addresses.")
        return read_picture(fetch(address, limits), limits)
    raise UserError("a picture is given as a data: address, for example data:image/png;base64,...")


def _size(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as header:
            return header.size
    except Exception:  # too large or damaged: picture_from has the sentence for it
        return 0, 0


def _inline(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError("a data: address is written data:image/png;base64,... with the picture in base64.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("the picture's base64 is damaged; encode it again.") from error
