"""Batches of pictures of one size with dense targets: what the tower learns from.

Legend: B pictures, P patches, M = P / 4 merged tokens (cells of 28 x 28 px)
    patches uint8 (B, P, 588); targets[channel] int64 (B, M), one class per cell

A *source* draws one example: source(rng, size) with size = (height, width) in px gives an object with `image`
(PIL, of that size), `dense` (channel -> (rows, columns)) and `turns`. Sources come from outside: this package
knows no task.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casa.training.patches import CELL, PATCH, patchify

Source = Callable[[np.random.Generator, tuple[int, int] | None], Any]


@dataclass(frozen=True)
class SizePhase:
    """Up to which share of the run pictures have sides of min_side..max_side px (multiples of 28)."""

    until: float
    min_side: int
    max_side: int


@dataclass(frozen=True)
class DenseBatch:
    """grid: rows and columns of patches."""

    patches: NDArray[np.uint8]
    grid: tuple[int, int]
    targets: dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class DenseBatches:
    """Makes batch number n of a run: same seed and n, same batch.

    mix: how often each source is drawn, relative. patches: about how many per batch.
    """

    sources: Mapping[str, Source]
    mix: Mapping[str, float]
    phases: tuple[SizePhase, ...]
    steps: int
    patches: int
    seed: int

    def __call__(self, number: int) -> DenseBatch:
        rng = np.random.default_rng([self.seed, 2, number])
        size = self._size(number, rng)
        per_picture = size[0] * size[1] // PATCH**2
        count = max(1, round(self.patches / per_picture))
        names = list(self.mix)
        shares = np.array([self.mix[name] for name in names])
        drawn = [self.sources[names[i]](rng, size) for i in rng.choice(len(names), count, p=shares / shares.sum())]
        return DenseBatch(
            patches=np.stack([patchify(np.asarray(example.image)) for example in drawn]),
            grid=(size[0] // PATCH, size[1] // PATCH),
            targets={name: np.stack([e.dense[name].ravel() for e in drawn]) for name in drawn[0].dense},
        )

    def _size(self, number: int, rng: np.random.Generator) -> tuple[int, int]:
        share = number / self.steps
        phase = next((p for p in self.phases if share < p.until), self.phases[-1])
        height, width = rng.integers(phase.min_side // CELL, phase.max_side // CELL + 1, 2) * CELL
        return int(height), int(width)
