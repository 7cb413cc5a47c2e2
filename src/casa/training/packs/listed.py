"""Records that are in memory already, as a source for packs."""

from collections.abc import Iterator, Sequence
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Origin, Record
from casa.data.settings import Shard


class ListedRecords:
    """The records of a list, each reader's share of them, round and round (or once).

    refused: (origin, why) of every record that could not be learned from.
    """

    def __init__(self, records: Sequence[Record], shard: Shard | None = None, *, repeat: bool = True) -> None:
        shard = shard if shard is not None else Shard()
        self._records = records[shard.index :: shard.count]
        self._repeat = repeat
        self._next = 0
        self.refused: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Record]:
        while self._records and (self._repeat or self._next < len(self._records)):
            number = self._next
            self._next += 1
            yield self._records[number % len(self._records)]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]

    def refuse(self, origin: Origin, bad: BadRecord) -> None:
        self.refused.append((str(origin), str(bad)))
