"""Rows in a random order that can be resumed exactly, from a state of a few numbers.

Rows are shuffled in blocks: each block's order depends on seed, epoch and the block's number alone. A state therefore
says where the block begins and how many of its rows were given; to resume, the block is read again. While one block is
given, the next is read, a row at a time, so that training never waits for a whole one.

    file      a b c d | e f g h | i j
    given     c a d b | f h e g | j i
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from casa.data.rows import Found, Rows

# A block ends here even if it has fewer rows: rows may carry pictures.
BLOCK_BYTES = 256 * 1024 * 1024


class Shuffled:
    """One source, epoch after epoch. block: rows that are mixed; 1 keeps the order. epoch: the one being given."""

    def __init__(self, rows: Rows, seed: list[int], block: int) -> None:
        self._rows, self._seed, self._size = rows, seed, max(1, block)
        self._begin({"epoch": 0, "block": 0, "position": None, "given": 0})

    def next(self) -> Found | None:
        """The next row of the epoch; None at its end (`next_epoch` goes on)."""
        while self._given >= len(self._order):
            if not self._next_block():
                return None
        at = self._order[self._given]
        found, self._block[at] = self._block[at], None
        self._given += 1
        self._take()
        return found

    def next_epoch(self) -> None:
        """From the beginning, in another order."""
        self._begin({"epoch": self.epoch + 1, "block": 0, "position": None, "given": 0})

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"epoch": self.epoch, "block": self._number, "position": self._position, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._begin(state)

    def _begin(self, state: dict[str, Any]) -> None:
        self.epoch, self._number, self._position = state["epoch"], state["block"], state["position"]
        self._source: Iterator[Found] | None = None
        self._block: list[Found | None] = []
        self._order: list[int] = []
        self._given = state["given"]
        self._loaded = False
        self._ahead: list[Found] = []
        self._ahead_bytes = 0

    def _next_block(self) -> bool:
        """Makes the rows read ahead the block at hand; False if there are none."""
        if self._loaded:
            self._number, self._given, self._position = self._number + 1, 0, self._ahead_position
        else:
            self._source = iter(self._rows.start(self.epoch, self._position))
            self._loaded = True
        while self._take():
            pass
        self._block = list[Found | None](self._ahead)
        self._ahead, self._ahead_bytes = [], 0
        self._ahead_position = self._rows.position()
        order = np.arange(len(self._block))
        if self._size > 1:
            np.random.default_rng([*self._seed, self.epoch, self._number]).shuffle(order)
        self._order = order.tolist()
        return bool(self._order)

    def _take(self) -> bool:
        """Reads one row ahead; False if the block is full or the source at its end."""
        if len(self._ahead) >= self._size or self._ahead_bytes >= BLOCK_BYTES or self._source is None:
            return False
        found = next(self._source, None)
        if found is None:
            return False
        self._ahead.append(found)
        self._ahead_bytes += found.row.size
        return True
