"""What every reader of a media file asks first: is there a file with something in it, is it text, does it move?

Pictures are films in two ways: one file format with many frames (animated WebP, PNG, AVIF; a TIFF of pages), and
pictures one after another in one file, as cameras and `ffmpeg -f image2pipe` write them.
"""

import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa.errors import UserError

HEAD_BYTES = 4096
_PNG = b"\x89PNG\r\n\x1a\n"
_HEIC_FILMS = (b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
_HEICS = (b"heic", b"heix", b"heim", b"heis", b"mif1", *_HEIC_FILMS)
# a JPEG's markers: those with a length behind them, and, within its coded data, the next that is not part of that
_BARE = (0x01, 0xD8, *range(0xD0, 0xD8))
_SIZES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)


@dataclass(frozen=True)
class Kind:
    """What a file is. name: of a picture's format, or "video". frames: "one", a picture; "pages", what Pillow reads
    frame by frame; "many", what FFmpeg does, as `format` (FFmpeg's name; None: it finds out).
    """

    name: str
    frames: str
    format: str | None = None


def sniff(path: str | os.PathLike[str]) -> Kind:
    """What kind of picture or film there is at `path`, by its content. Raises UserError for what cannot be either."""
    head = read_head(path, "video")
    if looks_like_text(head):
        raise UserError(f"{path} is a text file, not a video: name a video file.")
    if head.startswith(b"\xff\xd8\xff"):
        return Kind("mjpeg", "many", "mjpeg") if _whole(path, _jpegs_in_a_row) else Kind("jpeg", "one")
    if head.startswith(_PNG):
        return _whole(path, _png)
    if (name := pages_by_head(head)) is not None:
        return Kind(name, "pages")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _one_or_row(path, "webp", 8 + int.from_bytes(head[4:8], "little"), b"RIFF")
    if head.startswith(b"BM"):
        return _one_or_row(path, "bmp", int.from_bytes(head[2:6], "little"), b"BM")
    if head[4:12] == b"ftypavif":
        return Kind("avif", "one")
    if is_heic(head) and head[8:12] not in _HEIC_FILMS:
        return Kind("heic", "one")
    return Kind("video", "many")


def is_heic(head: bytes) -> bool:
    """Whether a file that begins so is a HEIC picture, or a row of them, as iPhones take them."""
    # AVIF is of the same family, and may only say so among the brands behind the first
    return head[4:8] == b"ftyp" and head[8:12] in _HEICS and b"avif" not in head[16 : int.from_bytes(head[:4], "big")]


def read_head(path: str | os.PathLike[str], kind: str) -> bytes:
    """The first bytes of the file at `path`; `kind` ("picture", "video") is how the sentences call it.

    Raises:
        UserError: nothing there, a directory, a pipe or device, an empty file, or no right to read it.
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


def pages_by_head(head: bytes) -> str | None:
    """The name of a format of many pictures that FFmpeg does not read, by a file's first bytes; None for others."""
    if head.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    moves = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and head[20] & 0x02
    return "webp" if moves else None


def _whole(path: str | os.PathLike[str], asked: Callable[[mmap.mmap], Any]) -> Any:
    """What `asked` says of all bytes of a file, which are not read before they are looked at."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return asked(data)


def _one_or_row(path: str | os.PathLike[str], name: str, end: int, head: bytes) -> Kind:
    """end: where the first picture ends; another's head there makes it a film."""
    with open(path, "rb") as file:
        # formats of even lengths fill up an odd one
        file.seek(end + end % 2 if name == "webp" else end)
        return Kind(name, "many", f"{name}_pipe") if end and file.read(len(head)) == head else Kind(name, "one")


def _png(data: mmap.mmap) -> Kind:
    at = len(_PNG)
    while at + 12 <= len(data):
        kind = data[at + 4 : at + 8]
        if kind == b"acTL":
            return Kind("apng", "many", "apng")
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        # a download whose room was made beforehand goes on in zeros
        if kind == b"IEND" or not kind.isalpha():
            break
    return Kind("png", "many", "png_pipe") if data[at : at + len(_PNG)] == _PNG else Kind("png", "one")


def _jpegs_in_a_row(data: mmap.mmap) -> bool:
    """Whether a second picture of the same size follows the first. Files of several that name them all in the first
    (MPO: the other eye, a preview, a gain map) are one picture, and so is one with something else behind it.
    """
    first = _jpeg(data, 0)
    if first is None or first[2] or data[first[0] : first[0] + 3] != b"\xff\xd8\xff":
        return False
    second = _jpeg(data, first[0])
    # one that is cut off counts by its head
    return second is not None and second[1] == first[1]


def _jpeg(data: mmap.mmap, at: int) -> tuple[int, bytes, bool] | None:
    """(where it ends, its height and width as written, whether it lists others); None if it has no size."""
    size, lists = b"", False
    while (found := _NEXT_MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            break
        if marker in _BARE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if marker in _SIZES and not size:
            size = data[at + 3 : at + 7]
        lists = lists or (marker == 0xE2 and data[at + 2 : at + 6] == b"MPF\0")
        at += max(2, length)
    else:
        at = len(data)
    return (at, size, lists) if size else None
