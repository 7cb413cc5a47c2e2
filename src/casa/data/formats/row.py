"""One row as a file holds it, before its shape is known, and how a file is read from any of its rows on.

A cursor is (rows before the next one, counted in its piece; its byte in the file, where the format has use for that).
A reader gives the rows of one piece from a cursor on, passing over those that `mine` refuses as cheaply as it can. It
raises nothing about the file's content: what cannot be read is a row whose value is a BadRecord.

A compressed file (rows.jsonl.gz) is read as what it holds; a place in it is a byte of what it holds, too.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from casa.errors import UserError

Cursor = tuple[int, int]
START: Cursor = (0, 0)
# No row may hold more bytes: a file without line ends is not read into memory whole.
LONGEST = 256 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """line: in the file, from 1. value: the parsed row, or a BadRecord. size: bytes, about. after: the next row.
    members: files that came with it, by name. last: whether nothing of the piece can be read after it. entry: as an
    `Origin` names it besides its line."""

    line: int
    value: Any
    size: int
    after: Cursor
    members: Mapping[str, bytes] = field(default_factory=dict)
    last: bool = False
    entry: str = ""


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one that can be read without the rest. part: which; first: rows of the file before it."""

    path: Path
    part: int = 0
    first: int = 0


# (piece, cursor, which rows of the piece are wanted, by their number from 0)
Reader = Callable[[Piece, Cursor, Callable[[int], bool]], Iterator[Row]]


_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}


def ending_of(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of rows.jsonl.gz, (".jsonl", "") of rows.jsonl: what a file holds, and how it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _SHORT:
        suffixes = Path(f"x{_SHORT[suffixes[-1]]}").suffixes
    if suffixes and suffixes[-1] in _OPENERS:
        return (suffixes[0] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def open_file(path: Path) -> BinaryIO:
    """What a file holds, decompressed; going back in a compressed one means to read it again from its beginning.

    Raises UserError if it is compressed as Zstandard does, and nothing here can read that.
    """
    return cast(BinaryIO, _OPENERS.get(ending_of(path)[1], _open_plain)(path))


def damage() -> tuple[type[Exception], ...]:
    """What is raised while a file is read that is damaged, cut off or no longer there."""
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *((zstd.ZstdError,) if (zstd := _zstandard()) else ()))


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


@cache
def _zstandard() -> Any:
    """The module of Python 3.14 that reads Zstandard, or the one that brings it to older ones; None without either."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return import_module(name)
    return None


def _open_zstandard(path: Path) -> Any:
    if _zstandard() is None:
        raise UserError(f"Reading {path} needs backports.zstd: install casa-vlm[train], or decompress it.")
    return _zstandard().open(path, "rb")


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
COMPRESSIONS = tuple(_OPENERS)
