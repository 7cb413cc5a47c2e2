"""Packer: a greedy knapsack over two budgets at once, from a buffer in which nobody waits for ever.

    buffer, oldest first    a   b   c   d   e   f ...
    pack                    a                           the oldest always goes
                            a + d                       then whoever points most nearly where room is left
                            a + d + f + ...             until nobody fits

Each pack takes the oldest sample, so one with k others before it waits for at most k packs; and those that have waited
for `patience` packs are taken, oldest first, before all others that fit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from casa.training.samples.budget import Budget


class Sized(Protocol):
    """What can be packed."""

    @property
    def text_tokens(self) -> int: ...

    @property
    def image_tokens(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


@dataclass
class _Waiting(Generic[Item]):
    item: Item
    since: int


class Packer(Generic[Item]):
    """Fills packs. The same items in the same order give the same packs.

    buffer: items that may wait. patience: packs after which an item goes first. packs: how many were made.
    """

    def __init__(self, budget: Budget, buffer: int = 256, patience: int = 16) -> None:
        self.budget, self.buffer, self.patience = budget, buffer, patience
        self.packs = 0
        self._waiting: list[_Waiting[Item]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self.buffer

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

    def pack(self) -> list[Item]:
        """The next pack, in the order of arrival; empty only if nobody waits."""
        if not self._waiting:
            return []
        sizes = np.array([(w.item.text_tokens, w.item.image_tokens) for w in self._waiting], dtype=np.float64)
        sizes /= (self.budget.text, self.budget.image)
        free = np.ones(len(sizes), dtype=bool)
        room = np.ones(2)
        # sums of sizes and budgets are compared as shares; half a token is above all rounding
        slack = 0.5 / max(self.budget.text, self.budget.image)

        def take(index: int) -> None:
            nonlocal room
            free[index] = False
            room = room - sizes[index]

        take(0)
        for index, entry in enumerate(self._waiting):
            if self.packs - entry.since < self.patience:
                break
            if free[index] and (sizes[index] <= room + slack).all():
                take(index)
        while True:
            fits = free & (sizes <= room + slack).all(axis=1)
            if not fits.any():
                break
            # the largest share of what is left, on both axes together; of equals, the oldest
            score = np.where(fits, sizes @ np.maximum(room, 0.0), -1.0)
            take(int(score.argmax()))
        chosen = [entry.item for entry, left in zip(self._waiting, free, strict=True) if not left]
        self._waiting = [entry for entry, left in zip(self._waiting, free, strict=True) if left]
        self.packs += 1
        return chosen

    def state_dict(self) -> dict[str, list[int] | int]:
        """Packs made, and since which of them each waiting item waits; the items themselves are the caller's."""
        return {"packs": self.packs, "since": [entry.since for entry in self._waiting]}

    def load_state_dict(self, state: dict, items: Iterable[Item]) -> None:
        """Goes on from `state_dict`, with the items that waited then."""
        self.packs = int(state["packs"])
        self._waiting = [_Waiting(item, int(since)) for item, since in zip(items, state["since"], strict=True)]
