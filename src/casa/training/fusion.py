"""Stage `fusion`: text learns to look. CASA layers, projector and text model together, on answers only.

The tower stays as it is, so what it says of a picture is computed once and kept: a picture is asked many
questions over many steps. Fresh pictures join the pool all the time, the oldest leave it.

Legend: N image tokens of a picture, C the tower's output width
    features float16 (N, C)     kept per picture, in half the memory
    grid (rows, columns)        of patches, N = rows * columns / 4
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from casa.training.conversation import Sample, Writer
from casa.training.packing import PackedRows, pack
from casa.training.patches import PATCH, patchify, to_pixels
from casa.training.tower_batch import encode_batch


@dataclass(frozen=True)
class Raw:
    """Pictures of one size with what is said about them, before the tower has seen them.

    patches: uint8 (pictures, P, 588). turns: questions about the one picture. captions: one per picture of a clip.
    """

    kind: str
    patches: NDArray[np.uint8]
    grid: tuple[int, int]
    turns: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """The same after the tower: features float16 (pictures, N, C)."""

    kind: str
    features: Tensor
    grid: tuple[int, int]
    turns: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class FreshPictures:
    """Draws what joins the pool at step n: same seed and n, same pictures.

    mix: how often a step draws from each source. patches: about how many per step. min_side, max_side: px, of
    pages and scenes; small ones are drawn more often, as they cost less. A source whose examples have `captions`
    gives clips.
    """

    sources: Mapping[str, Any]
    clips: Mapping[str, Any]
    mix: Mapping[str, float]
    patches: int
    min_side: int
    max_side: int
    seed: int

    def __call__(self, number: int) -> list[Raw]:
        rng = np.random.default_rng([self.seed, 3, number])
        names = list(self.mix)
        shares = np.array([self.mix[name] for name in names])
        name = names[rng.choice(len(names), p=shares / shares.sum())]
        if name in self.clips:
            return [self._clip(name, rng)]
        cell = 2 * PATCH
        low, high = self.min_side / cell, self.max_side / cell + 1
        height, width = (int(v) * cell for v in low * (high / low) ** rng.random(2))
        count = max(1, round(self.patches * PATCH**2 / (height * width)))
        drawn = [self.sources[name](rng, (height, width)) for _ in range(count)]
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
        clip = self.clips[name](rng, None)
        pictures = np.stack([patchify(np.asarray(frame)) for frame in clip.frames()])
        return Raw(
            name, pictures, (clip.height // PATCH, clip.width // PATCH), captions=tuple(clip.captions())
        )


@torch.no_grad()
def look(tower: nn.Module, raws: Sequence[Raw]) -> list[Seen]:
    """Runs the tower over pictures, those of one size together (at most a few thousand patches at once)."""
    seen = []
    for raw, features in zip(raws, _encoded(tower, raws), strict=True):
        seen.append(Seen(raw.kind, features, raw.grid, raw.turns, raw.captions))
    return seen


def _encoded(tower: Any, raws: Sequence[Raw], most: int = 6000) -> Iterator[Tensor]:
    start = 0
    while start < len(raws):
        stop, patches = start, 0
        while stop < len(raws) and raws[stop].grid == raws[start].grid and (stop == start or patches < most):
            patches += raws[stop].patches.shape[0] * raws[stop].patches.shape[1]
            stop += 1
        group = raws[start:stop]
        stacked = np.concatenate([raw.patches for raw in group])
        per_call = max(1, most // stacked.shape[1])
        outs = [
            encode_batch(tower, to_pixels(stacked[i : i + per_call]), group[0].grid).half()
            for i in range(0, len(stacked), per_call)
        ]
        yield from torch.cat(outs).split([len(raw.patches) for raw in group])
        start = stop


class Pool:
    """The pictures at hand, by kind, each kind bounded by its number of image tokens; the oldest leave first."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._by_kind: dict[str, deque[Seen]] = {}
        self._tokens: dict[str, int] = {}

    def add(self, items: Sequence[Seen]) -> None:
        for item in items:
            kept = self._by_kind.setdefault(item.kind, deque())
            kept.append(item)
            self._tokens[item.kind] = self._tokens.get(item.kind, 0) + _tokens(item)
            while self._tokens[item.kind] > self.most_tokens and len(kept) > 1:
                self._tokens[item.kind] -= _tokens(kept.popleft())

    def draw(self, kind: str, count: int, rng: np.random.Generator) -> list[Seen]:
        """`count` items of a kind, each at most once; fewer if there are fewer."""
        kept = self._by_kind.get(kind, deque())
        chosen = rng.choice(len(kept), min(count, len(kept)), replace=False) if kept else []
        return [kept[int(i)] for i in chosen]

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._by_kind.values())


def _tokens(item: Seen) -> int:
    return item.features.shape[0] * item.features.shape[1]


def write(item: Seen, writer: Writer, prompt: str, most_turns: int, rng: np.random.Generator) -> Sample:
    """An item as tokens: a clip whole, or up to `most_turns` of a picture's questions in random order."""
    if item.captions:
        return writer.clip(prompt, item.captions)
    count = int(rng.integers(1, most_turns + 1))
    return writer.dialogue([item.turns[int(i)] for i in rng.permutation(len(item.turns))[:count]])


def collate(items: Sequence[Seen], samples: Sequence[Sample], row_tokens: int, pad: int) -> dict[str, Tensor]:
    """Arguments for the fused model's forward pass."""
    rows = pack(samples, row_tokens, pad)
    return arguments(rows, [items[sample].features[picture] for sample, picture in rows.pictures],
                     [items[sample].grid for sample, _ in rows.pictures])


def arguments(rows: PackedRows, features: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    return {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "labels": rows.labels,
        "image_positions": rows.image_positions,
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        "image_features": torch.cat(list(features)).float(),
    }
