"""One row as a file holds it, before its shape is known, and how a file is read from any of its rows on.

A cursor is (rows before the next one, counted in its piece; its byte in the file, where the format has use for that).
A reader gives the rows of one piece from a cursor on, passing over those that `mine` refuses as cheaply as it can. It
raises nothing about the file's content: what cannot be read is a row whose value is a BadRecord.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cursor = tuple[int, int]
START: Cursor = (0, 0)
# No row may hold more bytes: a file without line ends is not read into memory whole.
LONGEST = 256 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """line: in the file, from 1. value: the parsed row, or a BadRecord. size: bytes, about. after: the next row.
    members: files that came with it, by name. last: whether nothing of the piece can be read after it."""

    line: int
    value: Any
    size: int
    after: Cursor
    members: Mapping[str, bytes] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one that can be read without the rest. part: which; first: rows of the file before it."""

    path: Path
    part: int = 0
    first: int = 0


# (piece, cursor, which rows of the piece are wanted, by their number from 0)
Reader = Callable[[Piece, Cursor, Callable[[int], bool]], Iterator[Row]]
