"""Rows of one source in one epoch, dealt out to readers without overlap or loss, from any position on.

Where there are at least as many pieces (files, or row groups of parquet) as readers, each piece goes to one reader;
otherwise every reader passes over the others' rows.

    3 readers, 5 pieces   a -> 0   b -> 1   c -> 2   d -> 0   e -> 1
    3 readers, 1 piece    rows 0 1 2 3 4 5 6 ... -> 0 1 2 0 1 2 0 ...
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from casa.data.bad import BadRecord, said_by
from casa.data.formats import pieces_of, reader_of
from casa.data.formats.row import START, Piece, Row, damage
from casa.data.places import data_files
from casa.data.record import Origin
from casa.data.settings import Shard


@dataclass(frozen=True)
class Found:
    """A row and where it was found. folder: where its relative paths start, unless the settings say otherwise."""

    row: Row
    origin: Origin
    folder: Path


class Rows(Protocol):
    """One source's rows, as one reader sees them. Positions are plain values."""

    def start(self, epoch: int, position: Any = None) -> Iterator[Found]:
        """The rows of an epoch, from a position on (None: all). One iteration at a time."""
        ...

    def position(self) -> Any:
        """Where the running iteration stands: before the next row."""
        ...

    def fingerprint(self) -> str:
        """What must be the same for a position to mean the same row."""
        ...


def dealt(pieces: int, shard: Shard, order: list[int] | None) -> list[tuple[int, Callable[[int], bool]]]:
    """This reader's pieces, by number, each with the question which of its rows (from 0) are wanted.

    order: seeds of the order in which pieces come; None keeps it. All readers must give the same.
    """
    numbers = np.arange(pieces)
    if order is not None:
        np.random.default_rng(order).shuffle(numbers)
    count, index = shard.count, shard.index
    if pieces >= count:
        return [(int(piece), lambda row: True) for piece in numbers[index::count]]
    return [(int(p), lambda row, p=int(p): (p + row) % count == index) for p in numbers]


class FileRows:
    """Rows of local files. shuffled: pieces come in another order each epoch."""

    def __init__(self, path: str, shard: Shard, seed: int, shuffled: bool, split: str = "train") -> None:
        self._files = data_files(path, split)
        self._shard, self._seed, self._shuffled = shard, seed, shuffled
        self._pieces: list[Piece] | None = None
        self._at: tuple[int, int, int] = (0, *START)

    def start(self, epoch: int, position: Any = None) -> Iterator[Found]:
        if self._pieces is None:
            self._pieces = [piece for file in self._files for piece in pieces_of(file)]
        pieces = dealt(len(self._pieces), self._shard, [self._seed, epoch] if self._shuffled else None)
        self._at = (0, *START) if position is None else (position[0], position[1], position[2])
        while self._at[0] < len(pieces):
            number, (chosen, mine) = self._at[0], pieces[self._at[0]]
            piece = self._pieces[chosen]
            for row in self._read(piece, (self._at[1], self._at[2]), mine):
                self._at = (number + 1, *START) if row.last else (number, *row.after)
                yield Found(row, Origin(str(piece.path), row.line, row.entry), piece.path.parent)
            self._at = (number + 1, *START)

    def position(self) -> list[int]:
        return list(self._at)

    def fingerprint(self) -> str:
        """Names and sizes of the files."""
        told = [f"{file.name} {file.stat().st_size}" for file in self._files]
        return hashlib.sha256("\n".join(told).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @staticmethod
    def _read(piece: Piece, cursor: tuple[int, int], mine: Any) -> Iterator[Row]:
        line, after = cursor[0], cursor
        try:
            for row in reader_of(piece.path)(piece, cursor, mine):
                line, after = row.line, row.after
                yield row
        except damage() as error:
            why = getattr(error, "strerror", None) or said_by(error)
            bad = BadRecord("unreadable-file", f"The file cannot be read from here on ({why}): copy it again.")
            # told by each of its readers: where others stand, none of them knows
            yield Row(line + 1, bad, 0, after, last=True)
