"""Batches of pictures of one size with dense targets: what the tower learns from.

Legend: B pictures, P patches, M = P / 4 merged tokens (cells of 28 x 28 px)
    patches uint8 (B, P, 588); targets[channel] int64 (B, M), one class per cell
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casa.errors import UserError
from casa.training.patches import CELL, PATCH, patchify
from casa.training.recipe import Sizes, TowerStage
from casa.training.sources import Sources


@dataclass(frozen=True)
class DenseBatch:
    """grid: rows and columns of patches."""

    patches: NDArray[np.uint8]
    grid: tuple[int, int]
    targets: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class DenseBatches:
    """Makes batch number n of a run: same seed and n, same batch."""

    sources: Sources
    stage: TowerStage
    seed: int

    def __call__(self, number: int) -> DenseBatch:
        rng = np.random.default_rng([self.seed, 2, number])
        sizes = self._sizes(number)
        size = _drawn(sizes, rng)
        count = max(1, round((sizes.patches or self.stage.patches) * PATCH**2 / (size[0] * size[1])))
        names = [name for name in self.stage.mix if self.sources.allows(name, size)]
        if not names:
            raise UserError(
                f"no source of the tower's mix draws pictures of {size[0]} x {size[1]} px; change its sizes."
            )
        shares = np.array([self.stage.mix[name] for name in names])
        chosen = rng.choice(len(names), count, p=shares / shares.sum())
        return stack([self.sources.pictures[names[i]](rng, size) for i in chosen], list(self.stage.channels))

    def _sizes(self, number: int) -> Sizes:
        share = number / self.stage.optimisation.steps
        return next((s for s in self.stage.sizes if share < s.until), self.stage.sizes[-1])


def _drawn(sizes: Sizes, rng: np.random.Generator) -> tuple[int, int]:
    # small sides are drawn more often: their pictures are cheap, and batches of them are varied
    low, high = sizes.smallest / CELL, sizes.largest / CELL + 1
    height, width = (int(v) * CELL for v in low * (high / low) ** rng.random(2))
    return height, width


def stack(examples: Sequence[Any], channels: Sequence[str]) -> DenseBatch:
    """Examples of one size as a batch, with the targets of the channels named."""
    pictures = [np.asarray(example.image) for example in examples]
    height, width = pictures[0].shape[:2]
    return DenseBatch(
        patches=np.stack([patchify(picture) for picture in pictures]),
        grid=(height // PATCH, width // PATCH),
        targets={name: np.stack([e.dense[name].ravel() for e in examples]) for name in channels},
    )
