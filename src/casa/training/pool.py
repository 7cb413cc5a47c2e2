"""Pictures that the tower has seen, kept to be asked about many times.

The tower stays as it is during the fusion stage, so what it says of a picture is computed once. Draw number n
gives the same pictures for the same seed, and the pool holds the draws of the last so many steps: after an
interruption it is rebuilt exactly.

Legend: N image tokens of a picture, C the tower's output width, n pictures of one size
    patches uint8 (n, P, 588); features float16 (n, N, C): half the memory; grid (rows, columns) of patches
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from casa.training.patches import CELL, PATCH, patchify, to_pixels
from casa.training.recipe import FusionStage
from casa.training.sources import Sources
from casa.training.tower_batch import encode_batch

_MOST_PATCHES = 6000  # through the tower at once, which bounds memory


@dataclass(frozen=True)
class Raw:
    """Pictures of one size with what is said about them: turns about a single one, or a caption for each."""

    kind: str
    patches: NDArray[np.uint8]
    grid: tuple[int, int]
    turns: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """The same with the tower's features in place of patches."""

    kind: str
    features: Tensor
    grid: tuple[int, int]
    turns: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draws:
    """Makes draw number n: one clip, or some pictures of one size from one source. Small sizes are more frequent."""

    sources: Sources
    stage: FusionStage
    seed: int

    def __call__(self, number: int) -> list[Raw]:
        rng = np.random.default_rng([self.seed, 3, number])
        names = list(self.stage.mix)
        shares = np.array([self.stage.mix[name] for name in names])
        name = names[rng.choice(len(names), p=shares / shares.sum())]
        if name in self.sources.clips:
            return [self._clip(name, rng)]
        least, greatest = self.sources.sides.get(name, (0, self.stage.largest))
        low = max(self.stage.smallest, least) / CELL
        high = min(self.stage.largest, greatest) / CELL + 1
        height, width = (int(v) * CELL for v in low * (high / low) ** rng.random(2))
        count = max(1, round(self.stage.fresh_patches * PATCH**2 / (height * width)))
        drawn = [self.sources.pictures[name](rng, (height, width)) for _ in range(count)]
        return [
            Raw(
                name,
                patchify(np.asarray(example.image))[None],
                (height // PATCH, width // PATCH),
                turns=tuple((turn.question, turn.answer) for turn in example.turns),
            )
            for example in drawn
        ]

    def _clip(self, name: str, rng: np.random.Generator) -> Raw:
        clip = self.sources.clips[name](rng)
        pictures = np.stack([patchify(np.asarray(frame)) for frame in clip.frames()])
        grid = (clip.height // PATCH, clip.width // PATCH)
        return Raw(name, pictures, grid, captions=tuple(clip.captions()))


@torch.no_grad()
def look(tower: nn.Module, raws: Sequence[Raw]) -> list[Seen]:
    """Runs the tower over pictures, neighbours of one size together."""
    return [
        Seen(raw.kind, features, raw.grid, raw.turns, raw.captions)
        for raw, features in zip(raws, _features(tower, raws), strict=True)
    ]


def _features(tower: Any, raws: Sequence[Raw]) -> Iterator[Tensor]:
    start = 0
    while start < len(raws):
        stop = start + 1
        while stop < len(raws) and raws[stop].grid == raws[start].grid:
            stop += 1
        group = raws[start:stop]
        patches = np.concatenate([raw.patches for raw in group])
        size = max(1, _MOST_PATCHES // patches.shape[1])
        parts = [
            encode_batch(tower, to_pixels(patches[i : i + size]), group[0].grid).half()
            for i in range(0, len(patches), size)
        ]
        yield from torch.cat(parts).split([len(raw.patches) for raw in group])
        start = stop


class Pool:
    """The items of the last `draws` draws, by kind."""

    def __init__(self, draws: int) -> None:
        self._draws: deque[list[Seen]] = deque()
        self._most = draws
        self._by_kind: dict[str, deque[Seen]] = {}

    def add(self, items: list[Seen]) -> None:
        """One draw's items come in, and the oldest draw's go out."""
        self._draws.append(items)
        for item in items:
            self._by_kind.setdefault(item.kind, deque()).append(item)
        if len(self._draws) > self._most:
            for item in self._draws.popleft():
                self._by_kind[item.kind].popleft()

    def pick(self, kind: str, count: int, rng: np.random.Generator) -> list[Seen]:
        """`count` items of a kind, each at most once; fewer if there are fewer."""
        kept = self._by_kind.get(kind, deque())
        chosen = rng.choice(len(kept), min(count, len(kept)), replace=False) if kept else []
        return [kept[int(i)] for i in chosen]

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._by_kind.values())
