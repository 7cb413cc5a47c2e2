"""Packer: a greedy knapsack over two budgets at once, from a buffer in which nobody waits for ever.

    buffer, oldest first    a   b   c   d   e   f ...
    pack                    a                           the oldest always goes
                            a + d                       then whoever points most nearly where room is left
                            a + d + f + ...             until nobody fits
    instead, perhaps        a + b + e                   if much of both budgets is left: the fullest of the packs
                                                        that begin with the oldest and one of the next
    before, perhaps         c                           which is a full pack alone, and would only take up the buffer

All packs but those full ones take the oldest sample, and so do all once it has waited for `patience` packs: one with k
others before it waits for at most k + `patience`. Those that have waited for as long are taken, oldest first, before
all others that fit.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from casa.training.samples.budget import Budget

ENOUGH = 0.99  # of either budget: a pack as full as this is not improved on, or added to
TRIES = 64  # how many of the next oldest, at most


class Sized(Protocol):
    """What can be packed."""

    @property
    def text_tokens(self) -> int: ...

    @property
    def image_tokens(self) -> int: ...

    @property
    def held_bytes(self) -> int:
        """Memory that it takes while it waits, beside its tokens."""
        ...


Item = TypeVar("Item", bound=Sized)


@dataclass
class _Waiting(Generic[Item]):
    item: Item
    since: int


class Packer(Generic[Item]):
    """Fills packs. The same items in the same order give the same packs.

    buffer: items that may wait. patience: packs after which an item goes first. most_bytes: that waiting items may
    hold; the buffer is full there even if it has fewer. packs: how many were made.
    """

    def __init__(self, budget: Budget, buffer: int = 256, patience: int = 16, most_bytes: float = math.inf) -> None:
        self.budget, self.buffer, self.patience, self.most_bytes = budget, buffer, patience, most_bytes
        self.packs = 0
        self._waiting: list[_Waiting[Item]] = []
        self._held = 0  # bytes

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self.buffer or self._held >= self.most_bytes

    @property
    def waiting(self) -> list[Item]:
        """Those that wait, oldest first."""
        return [entry.item for entry in self._waiting]

    def add(self, item: Item) -> None:
        """Raises ValueError for an item that no pack can hold."""
        if not self.budget.holds(item.text_tokens, item.image_tokens):
            raise ValueError(
                f"{item.text_tokens} text and {item.image_tokens} image tokens are more than {self.budget}."
            )
        self._waiting.append(_Waiting(item, self.packs))
        self._held += item.held_bytes

    def pack(self) -> list[Item]:
        """The next pack, in the order of arrival; empty only if nobody waits."""
        if not self._waiting:
            return []
        sizes = np.array([(w.item.text_tokens, w.item.image_tokens) for w in self._waiting], dtype=np.float64)
        sizes /= (self.budget.text, self.budget.image)
        taken = self._choose(sizes)
        chosen = [entry.item for entry, goes in zip(self._waiting, taken, strict=True) if goes]
        self._waiting = [entry for entry, goes in zip(self._waiting, taken, strict=True) if not goes]
        self._held -= sum(item.held_bytes for item in chosen)
        self.packs += 1
        return chosen

    def _choose(self, sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Who goes, of those that wait. sizes: (n, 2), in shares of the budgets."""
        full = sizes.max(axis=1) >= ENOUGH
        if full.any() and self.packs - self._waiting[0].since < self.patience:
            # pieces of long videos, which hold most bytes of the buffer
            return np.arange(len(sizes)) == full.argmax()
        # sums of sizes and budgets are compared as shares; half a token is above all rounding
        slack = 0.5 / max(self.budget.text, self.budget.image)
        free = np.ones(len(sizes), dtype=bool)
        room = np.ones(2)
        for index, entry in enumerate(self._waiting):
            if index and self.packs - entry.since < self.patience:
                break
            if (sizes[index] <= room + slack).all():
                free[index] = False
                room = room - sizes[index]
        filled, left = _fill(sizes, free[None], room[None], slack)
        # few large samples, as of videos, leave gaps that other choices would not
        if left.min() > 1.0 - ENOUGH:
            starts = np.flatnonzero(free & (sizes <= room + slack).all(axis=1))[:TRIES]
            each = np.repeat(free[None], len(starts), axis=0)
            each[np.arange(len(starts)), starts] = False
            filled, left = _fill(sizes, np.vstack([filled, each]), np.vstack([left, room - sizes[starts]]), slack)
        return ~filled[left.min(axis=1).argmin()]

    def state_dict(self) -> dict[str, list[int] | int]:
        """Packs made, and since which of them each waiting item waits; the items themselves are the caller's."""
        return {"packs": self.packs, "since": [entry.since for entry in self._waiting]}

    def load_state_dict(self, state: dict, items: Iterable[Item]) -> None:
        """Goes on from `state_dict`, with the items that waited then."""
        self.packs = int(state["packs"])
        self._waiting = [_Waiting(item, int(since)) for item, since in zip(items, state["since"], strict=True)]
        self._held = sum(entry.item.held_bytes for entry in self._waiting)


def _fill(
    sizes: NDArray[np.float64], free: NDArray[np.bool_], room: NDArray[np.float64], slack: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Adds to c packs what fits into each, sample by sample: the largest share of what is left, on both axes together.

    sizes: (n, 2), of n samples that wait, in shares of the budgets. free: (c, n), True for those that are not in a
    pack. room: (c, 2), shares of the budgets that are left. Of equals, the oldest is added. Returns free and room.
    """
    free, room = free.copy(), room.copy()
    while True:
        fits = free & (sizes <= room[:, None] + slack).all(axis=-1)
        rows = np.flatnonzero(fits.any(axis=1))
        if not len(rows):
            return free, room
        score = np.where(fits, np.maximum(room, 0.0) @ sizes.T, -1.0)
        chosen = score.argmax(axis=1)[rows]
        free[rows, chosen] = False
        room[rows] -= sizes[chosen]
