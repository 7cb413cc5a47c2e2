"""Records of all sources of a run, drawn by weight, as one iterable that can stop and go on anywhere.

The order depends on the data, the settings, the seed and the reader, on nothing else: not on when it was interrupted.

    Records             draws from sources by weight
    _Source             mixes rows in blocks and makes records of them, epoch after epoch
    FileRows, HubRows   give the rows of an epoch, from any position on
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from casa.data.files import data_files
from casa.data.formats import START, FilePart, Row, file_parts, read_rows
from casa.data.frames import CachedFrames, video_frames
from casa.data.hub import PREFIX, HubRows
from casa.data.pictures import FramesOf, RowContext
from casa.data.record import BadRecord, BadRecordReport, NoRecord, Origin, Record
from casa.data.settings import DataSettings, Shard, SourceSettings
from casa.data.shapes import parse_row
from casa.errors import UserError

_DRAWS = 1024  # drawn at once: one generator per draw would cost more than a row
# A reader's share of one epoch may be a damaged file, and of the next a whole one. A source is given up after so many
# rows without a good one, the end of an epoch counting as several.
_BARREN, _END = 1000, 50
# A block of shuffled rows ends here even if it has fewer rows: rows may carry pictures.
BLOCK_BYTES = 256 * 1024 * 1024


def open_records(
    settings: DataSettings,
    *,
    seed: int = 0,
    shard: Shard | None = None,
    report: str | os.PathLike[str] | None = None,
    keep_frames: str | os.PathLike[str] | None = None,
) -> "Records":
    """Opens the records of a run, as one of its readers sees them.

    Args:
        settings: The sources, and how they are mixed.
        seed: Of all orders.
        shard: Which reader this is; alone if None.
        report: A folder for the lists of bad records, one file per reader.
        keep_frames: A folder in which frames of videos are kept, so that none is decoded twice.

    Raises:
        UserError: Data that are not there, or an extra that is not installed. Bad records raise nothing here.
    """
    shard = shard or Shard()
    path = None
    if report is not None:
        name = "bad-records.jsonl" if shard.count == 1 else f"bad-records-{shard.rank}-{shard.worker}.jsonl"
        path = Path(report) / name
    frames_of = video_frames if keep_frames is None else CachedFrames(keep_frames)
    return Records(settings, seed, shard, BadRecordReport(path, settings.strict), frames_of)


class Records(Iterator[Record]):
    """Iterates over records; what `open_records` returns.

    Where sources repeat there is no end. After an end, iterating again begins the next epoch. `report` counts what
    was passed over. Positions are plain values, so a state can be saved as JSON.
    """

    def __init__(
        self,
        settings: DataSettings,
        seed: int,
        shard: Shard,
        report: BadRecordReport,
        frames_of: FramesOf = video_frames,
    ) -> None:
        self.report = report
        self._settings, self._seed, self._shard = settings, seed, shard
        self._sources = [
            _Source(source, number, settings.shuffle, seed, shard, frames_of)
            for number, source in enumerate(settings.sources)
        ]
        self._weights = np.array([source.weight for source in settings.sources], dtype=np.float64)
        self._draws = 0
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0))
        self._ended = False

    def __iter__(self) -> "Records":
        if self._ended:
            self._ended = False
            for source in self._sources:
                source.next_epoch()
        return self

    def __next__(self) -> Record:
        for record in self.rows():
            if record is not None:
                return record
        raise StopIteration

    def rows(self) -> Iterator[Record | None]:
        """Row by row: its record, or None if it was bad (and counted) or holds none by its nature."""
        while (found := self._next_row()) is not None:
            source, row = found
            try:
                record = source.parse(row)
            except BadRecord as bad:
                self.report.add(row.origin, bad)
                record = None
            except NoRecord:
                record = None
            yield record

    def skip(self) -> bool:
        """Passes over the next row, unread; False if there is none."""
        return self._next_row() is not None

    def refuse(self, origin: Origin, bad: BadRecord) -> None:
        """Counts a record that turned out bad only when it was used. Raises UserError where settings are strict."""
        self.report.add(origin, bad)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what was counted, as plain values."""
        return {
            "seed": self._seed,
            "readers": [self._shard.world, self._shard.workers, self._shard.rank, self._shard.worker],
            "shuffle": self._settings.shuffle,
            "draws": self._draws,
            "ended": self._ended,
            "sources": [source.state_dict() for source in self._sources],
            "bad": dict(self.report.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on right after the record that came last when the state was taken.

        Raises:
            UserError: It was taken with another seed, number of readers, buffer or other data.
        """
        here = self.state_dict()
        names = {"seed": "seed", "readers": "number of processes or workers", "shuffle": "shuffle buffer"}
        for key, name in names.items():
            if state.get(key) != here[key]:
                raise UserError(
                    f"The data were left off with another {name} ({state.get(key)}, now {here[key]}): "
                    f"resume with the same, or start the data anew."
                )
        if [entry["data"] for entry in state["sources"]] != [entry["data"] for entry in here["sources"]]:
            raise UserError(
                "The data changed since they were left off: resume with the same files, or start the data anew."
            )
        self._draws, self._ended = state["draws"], state["ended"]
        self.report.counts.clear()
        self.report.counts.update(state["bad"])
        for source, entry in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(entry)

    def _next_row(self) -> "tuple[_Source, Row] | None":
        """The next row and its source; None at the end."""
        while not self._ended:
            source = self._draw()
            row = source.next() if source is not None else None
            if source is not None and row is not None:
                return source, row
            if source is None or self._settings.exhausted == "stop":
                self._ended = True
            else:
                source.end(repeat=self._settings.exhausted == "repeat")
        return None

    def _draw(self) -> "_Source | None":
        """The next source, by weight among those that still give; None if none does."""
        giving = [not source.left for source in self._sources]
        if not any(giving):
            return None
        if len(giving) == 1:
            return self._sources[0]
        block = self._draws // _DRAWS
        if self._drawn[0] != block:
            self._drawn = (block, np.random.default_rng([self._seed, self._shard.index, block]).random(_DRAWS))
        bounds = np.cumsum(self._weights * giving)
        chosen = int(np.searchsorted(bounds, self._drawn[1][self._draws % _DRAWS] * bounds[-1], side="right"))
        self._draws += 1
        return self._sources[min(chosen, len(giving) - 1)]


class _Source:
    """One source: its rows in a random order, epoch after epoch, from a state of a few numbers; and their records.

    Rows are shuffled in blocks: a block's order depends on seed, epoch and the block's number alone. A state therefore
    says where the block begins and how many of its rows were given; to resume, the block is read again. While one block
    is given, the next is read, a row at a time, so that training never waits for a whole one.

        file      a b c d | e f g h | i j
        given     c a d b | f h e g | j i

    left: it has ended and is not begun again.
    """

    def __init__(
        self, settings: SourceSettings, number: int, shuffle: int, seed: int, shard: Shard, frames_of: FramesOf
    ) -> None:
        self._settings, self._frames_of = settings, frames_of
        self._root = None if settings.root is None else Path(settings.root).expanduser()
        # all readers must agree on the order of files, and no two sources share an order of rows
        kind = HubRows if settings.path.startswith(PREFIX) else FileRows
        self._rows = kind(settings, shard, seed + number, shuffle > 1)
        self._seed, self._size = [seed, number, shard.index], max(1, shuffle)
        # whether this epoch had a good record; and rows since the last good one, about
        self._gave, self._barren = False, 0
        self._start_at(0)

    def parse(self, row: Row) -> Record:
        """Raises BadRecord, NoRecord."""
        self._barren += 1
        if isinstance(row.value, BadRecord):
            raise row.value
        root = row.folder if self._root is None else self._root
        record = parse_row(row.value, RowContext(row.origin, self._settings, root, row.members, self._frames_of))
        self._gave, self._barren = True, 0
        return record

    def end(self, repeat: bool) -> None:
        """All rows of the epoch were given. Raises UserError if it would be repeated for nothing."""
        if not repeat:
            self.left = True
            return
        self._barren = 0 if self._gave else self._barren + _END
        if self._barren >= _BARREN:
            raise UserError(
                f"{self._settings.path} has no record that can be read, or fewer records than readers: "
                f"`casa data check {self._settings.path}` tells more."
            )
        self.next_epoch()

    def next_epoch(self) -> None:
        """From the beginning, in another order."""
        self._gave = False
        self._start_at(self.epoch + 1)

    def next(self) -> Row | None:
        """The next row of the epoch; None at its end."""
        while self._given >= len(self._order):
            if not self._next_block():
                return None
        at = self._order[self._given]
        row, self._block[at] = self._block[at], None
        self._given += 1
        self._read_ahead()
        return row

    def state_dict(self) -> dict[str, Any]:
        own = {"data": self._rows.fingerprint, "left": self.left, "gave": self._gave, "barren": self._barren}
        return own | {"epoch": self.epoch, "block": self._number, "position": self._position, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start_at(state["epoch"], state["block"], state["position"], state["given"])
        self.left, self._gave, self._barren = state["left"], state["gave"], state["barren"]

    def _start_at(self, epoch: int, block: int = 0, position: list[Any] | None = None, given: int = 0) -> None:
        self.left = False
        self.epoch, self._number, self._position, self._given = epoch, block, position, given
        self._reader: Iterator[Row] | None = None
        self._block: list[Row | None] = []
        self._order: list[int] = []
        self._ahead: list[Row] = []
        self._ahead_bytes = 0

    def _next_block(self) -> bool:
        """Makes the rows read ahead the block at hand; False if there are none."""
        if self._reader is None:
            self._reader = self._rows.start(self.epoch, self._position)
        else:
            self._number, self._given, self._position = self._number + 1, 0, self._ahead_position
        while self._read_ahead():
            pass
        self._block = [*self._ahead]
        self._ahead, self._ahead_bytes = [], 0
        self._ahead_position = self._rows.position()
        order = np.arange(len(self._block))
        if self._size > 1:
            np.random.default_rng([*self._seed, self.epoch, self._number]).shuffle(order)
        self._order = order.tolist()
        return bool(self._order)

    def _read_ahead(self) -> bool:
        """Reads one row ahead; False if the block is full or the source at its end."""
        if self._reader is None or len(self._ahead) >= self._size or self._ahead_bytes >= BLOCK_BYTES:
            return False
        if (row := next(self._reader, None)) is None:
            return False
        self._ahead.append(row)
        self._ahead_bytes += row.size
        return True


class FileRows:
    """Rows of local files. shuffled: their parts come in another order each epoch."""

    def __init__(self, settings: SourceSettings, shard: Shard, seed: int, shuffled: bool) -> None:
        self._files = data_files(settings.path, settings.split)
        self._shard, self._seed, self._shuffled = shard, seed, shuffled
        self._parts: list[FilePart] | None = None
        self._at: tuple[int, int, int] = (0, *START)  # the part, and the cursor in it
        named = [f"{file.name} {file.stat().st_size}" for file in self._files]
        self.fingerprint = hashlib.sha256("\n".join(named).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def start(self, epoch: int, position: list[Any] | None = None) -> Iterator[Row]:
        """The rows of an epoch, from a position on (None: all). One iteration at a time."""
        if self._parts is None:
            self._parts = [part for file in self._files for part in file_parts(file)]
        parts = self._shard.share(len(self._parts), [self._seed, epoch] if self._shuffled else None)
        self._at = (0, *START) if position is None else (position[0], position[1], position[2])
        while self._at[0] < len(parts):
            number, *cursor = self._at
            chosen, mine = parts[number]
            for row in read_rows(self._parts[chosen], (cursor[0], cursor[1]), mine):
                self._at = (number + 1, *START) if row.last else (number, *row.after)
                yield row
            self._at = (number + 1, *START)

    def position(self) -> list[Any]:
        """Where the running iteration stands, before the next row, as plain values."""
        return list(self._at)
