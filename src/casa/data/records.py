"""Records of all sources of a run, drawn by weight, as one iterable that can stop and go on anywhere.

The order depends on the data, the settings, the seed and the reader, on nothing else: not on when it was interrupted.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from casa.data.bad import BadRecord, NoRecord, Report
from casa.data.frames import video_frames
from casa.data.hub import PREFIX, HubRows
from casa.data.kept_frames import KeptFrames
from casa.data.pictures import Files
from casa.data.record import Origin, Record
from casa.data.rows import FileRows, Found, Rows
from casa.data.settings import DataSettings, Shard, SourceSettings
from casa.data.shapes import parse_row
from casa.data.shapes.context import Context, FramesOf
from casa.data.shuffling import Shuffled
from casa.errors import UserError

_DRAWS = 1024  # drawn at once: one generator per draw would cost more than a row
# A reader's share of one epoch may be a damaged file, and of the next a whole one. A source is given up after so many
# rows without a good one, the end of an epoch counting as several.
_BARREN, _END = 1000, 50


def open_records(
    settings: DataSettings,
    *,
    seed: int = 0,
    shard: Shard | None = None,
    report: str | os.PathLike[str] | None = None,
    keep_frames: str | os.PathLike[str] | None = None,
) -> "Records":
    """The records of a run, as one of its readers sees them.

    shard: which reader this is; alone if None. report: a folder for the lists of bad records, one file per reader.
    keep_frames: a folder in which frames of videos are kept, so that none is decoded twice.

    Raises:
        UserError: data that are not there, or an extra that is not installed. Bad records raise nothing here.
    """
    shard = shard or Shard()
    path = None
    if report is not None:
        name = "bad-records.jsonl" if shard.count == 1 else f"bad-records-{shard.rank}-{shard.worker}.jsonl"
        path = Path(report) / name
    frames_of = video_frames if keep_frames is None else KeptFrames(keep_frames)
    return Records(settings, seed, shard, Report(path, settings.strict), frames_of)


class Records(Iterator[Record]):
    """Iterates over records; what `open_records` returns.

    Where sources repeat there is no end. After an end, iterating again begins the next epoch. `report` counts what
    was passed over. Positions are plain values, so a state can be saved as JSON.
    """

    def __init__(
        self, settings: DataSettings, seed: int, shard: Shard, report: Report, frames_of: FramesOf = video_frames
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

    @property
    def epochs(self) -> list[int]:
        """How many times each source was given whole."""
        return [source.epoch for source in self._sources]

    def __iter__(self) -> "Records":
        if self._ended:
            self._ended = False
            for source in self._sources:
                source.begin_again()
        return self

    def __next__(self) -> Record:
        for record in self.rows():
            if record is not None:
                return record
        raise StopIteration

    def rows(self) -> Iterator[Record | None]:
        """Row by row: its record, or None if it was bad (and counted) or holds none by its nature."""
        while (row := self._row()) is not None:
            yield self._parsed(*row)

    def skip(self) -> bool:
        """Passes over the next row, unread; False if there is none."""
        return self._row() is not None

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
            UserError: it was taken with another seed, number of readers, buffer or other data.
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

    def _row(self) -> "tuple[_Source, Found] | None":
        """The next row and its source; None at the end."""
        while not self._ended:
            source = self._draw()
            found = source.next() if source is not None else None
            if source is not None and found is not None:
                return source, found
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

    def _parsed(self, source: "_Source", found: Found) -> Record | None:
        try:
            return source.parse(found)
        except BadRecord as bad:
            self.report.add(found.origin, bad)
            return None
        except NoRecord:
            return None


class _Source:
    """One source: its rows in their order, and how they are read. left: it has ended and is not begun again.

    gave: whether this epoch had a good record. barren: rows since the last one, about.
    """

    def __init__(
        self, settings: SourceSettings, number: int, shuffle: int, seed: int, shard: Shard, frames_of: FramesOf
    ) -> None:
        self._settings, self._frames_of = settings, frames_of
        # all readers must agree on the order of files, and no two sources share an order of rows
        own = seed + number
        rows: Rows
        if settings.path.startswith(PREFIX):
            rows = HubRows(settings, shard, own, shuffle > 1)
        else:
            rows = FileRows(settings.path, shard, own, shuffle > 1, settings.split)
        self._rows, self._fingerprint = Shuffled(rows, [seed, number, shard.index], shuffle), rows.fingerprint()
        self.left = self.gave = False
        self.barren = 0

    @property
    def epoch(self) -> int:
        return self._rows.epoch

    def next(self) -> Found | None:
        return self._rows.next()

    def parse(self, found: Found) -> Record:
        """Raises BadRecord, NoRecord."""
        self.barren += 1
        if isinstance(found.row.value, BadRecord):
            raise found.row.value
        root = found.folder if self._settings.root is None else Path(self._settings.root).expanduser()
        files = Files(root, self._settings.outside, found.row.members)
        record = parse_row(found.row.value, Context(found.origin, files, self._settings, self._frames_of))
        self.gave, self.barren = True, 0
        return record

    def end(self, repeat: bool) -> None:
        """All rows of the epoch were given. Raises UserError if it would be repeated for nothing."""
        if not repeat:
            self.left = True
            return
        self.barren = 0 if self.gave else self.barren + _END
        if self.barren >= _BARREN:
            raise UserError(
                f"{self._settings.path} has no record that can be read, or fewer records than readers: "
                f"`casa data check {self._settings.path}` tells more."
            )
        self.gave = False
        self._rows.next_epoch()

    def begin_again(self) -> None:
        self.left = self.gave = False
        self._rows.next_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {
            "data": self._fingerprint,
            "left": self.left,
            "gave": self.gave,
            "barren": self.barren,
            **self._rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # positions that older versions saved say nothing of the last
        self.left, self.gave, self.barren = state["left"], state["gave"], state.get("barren", 0)
        self._rows.load_state_dict(state)
