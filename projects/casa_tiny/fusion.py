"""Stage `fusion`: text learns to look. CASA layers, projector and text model together, on answers only.

The tower stays as it is, so what it says of a picture is computed once, and kept to be asked about many times. Draw
number n gives the same pictures for the same seed, and the pool holds the draws of the last so many steps: after an
interruption it is rebuilt exactly.

Legend: n pictures of one size, P patches of a picture, N image tokens of all pictures, C the tower's output width
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from casa.evaluation.stream import PROMPT
from casa.models import adapt
from projects.casa_tiny.chat import ChatTokens, Writer, pack
from projects.casa_tiny.recipe import CELL, FusionStage, Recipe
from projects.casa_tiny.stage import train_stage
from projects.casa_tiny.tasks import CLIPS, PICTURES, SIDES
from projects.casa_tiny.tower import PATCH, encode_batch, patchify, to_pixels

_MAX_PATCHES = 6000  # through the tower at once, which bounds memory


@dataclass(frozen=True)
class Item:
    """Pictures of one size with what is said about them: turns about a single one, or a caption for each.

    Args:
        kind: The source's name.
        pictures: Patches, uint8 (n, P, 588), or what the tower says of them, float16 (n, P / 4, C): half the memory.
        grid: Rows and columns of patches.
        turns: Questions and answers.
        captions: Of a clip.
    """

    kind: str
    pictures: Tensor
    grid: tuple[int, int]
    turns: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] = ()


def train_fusion(
    recipe: Recipe,
    text: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tower: Any,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Fuses a text model and a tower, and trains all but the tower; writes the model to `out/fusion`."""
    stage = recipe.fusion
    torch.manual_seed(recipe.seed + 3)
    tower.requires_grad_(False).eval()
    model = adapt(text, fusion=stage.fusion, vision=tower)
    writer = Writer(tokenizer)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        pool = Pool(stage.pool_draws)
        # draw number n joins the pool for step n - prefill; a resumed run draws again what the pool still held
        first = max(0, start + stage.prefill - stage.pool_draws + 1)
        for number in range(first, stage.optimisation.steps + stage.prefill):
            pool.add(look(tower, draw(stage, recipe.seed, number)))
            step = number - stage.prefill
            if step < start:
                continue
            rng = np.random.default_rng([recipe.seed, 4, step])
            items = [item for kind, count in stage.batch.items() for item in pool.pick(kind, count, rng)]
            samples = [write(item, writer, stage.max_turns, rng) for item in items]
            inputs = collate(items, samples, stage.row_tokens, pad)
            if stage.dropout:
                # drawn by the step, so that one that is done again after an interruption hides the same
                drawn = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
                kept = torch.rand(inputs["image_features"].shape, generator=drawn) >= stage.dropout
                inputs["image_features"] = inputs["image_features"] * kept / (1 - stage.dropout)
            yield inputs

    def save(folder: Path) -> None:
        model.config.use_cache = True
        model.save_pretrained(folder)

    train_stage(recipe, "fusion", model, batches, out, save, callbacks)


def draw(stage: FusionStage, seed: int, number: int) -> list[Item]:
    """Draw number n: one clip, or some pictures of one size from one source. Small sizes are more frequent."""
    rng = np.random.default_rng([seed, 3, number])
    names = list(stage.mix)
    shares = np.array([stage.mix[name] for name in names])
    name = names[rng.choice(len(names), p=shares / shares.sum())]
    if name in CLIPS:
        clip = CLIPS[name](rng)
        patches = np.stack([patchify(np.asarray(frame)) for frame in clip.frames()])
        grid = (clip.height // PATCH, clip.width // PATCH)
        return [Item(name, torch.from_numpy(patches), grid, captions=tuple(clip.captions()))]
    least, greatest = SIDES[name]
    low = max(stage.smallest, least) / CELL
    high = min(stage.largest, greatest) / CELL + 1
    height, width = (int(v) * CELL for v in low * (high / low) ** rng.random(2))
    count = max(1, round(stage.fresh_patches * PATCH**2 / (height * width)))
    grid = (height // PATCH, width // PATCH)
    found = []
    for _ in range(count):
        example = PICTURES[name](rng, (height, width))
        turns = tuple((turn.question, turn.answer) for turn in example.turns)
        found.append(Item(name, torch.from_numpy(patchify(np.asarray(example.image)))[None], grid, turns))
    return found


@torch.no_grad()
def look(tower: nn.Module, items: Sequence[Item]) -> list[Item]:
    """The items of one draw with the tower's features in place of patches."""
    patches = torch.cat([item.pictures for item in items])
    size = max(1, _MAX_PATCHES // patches.shape[1])
    parts = [encode_batch(tower, to_pixels(part), items[0].grid).half() for part in patches.split(size)]
    features = torch.cat(parts).split([len(item.pictures) for item in items])
    return [replace(item, pictures=each) for item, each in zip(items, features, strict=True)]


class Pool:
    """The items of the last `max_draws` draws, by kind."""

    def __init__(self, max_draws: int) -> None:
        self.max_draws = max_draws
        self._draws: deque[list[Item]] = deque()
        self._by_kind: dict[str, deque[Item]] = {}

    def add(self, items: list[Item]) -> None:
        """One draw's items come in, and the oldest draw's go out."""
        self._draws.append(items)
        for item in items:
            self._by_kind.setdefault(item.kind, deque()).append(item)
        if len(self._draws) > self.max_draws:
            for item in self._draws.popleft():
                self._by_kind[item.kind].popleft()

    def pick(self, kind: str, count: int, rng: np.random.Generator) -> list[Item]:
        """`count` items of a kind, each at most once; fewer if there are fewer."""
        kept = self._by_kind.get(kind, deque())
        chosen = rng.choice(len(kept), min(count, len(kept)), replace=False) if kept else []
        return [kept[int(i)] for i in chosen]


def write(item: Item, writer: Writer, max_turns: int, rng: np.random.Generator) -> ChatTokens:
    """An item as tokens: a clip whole, or up to `max_turns` of a picture's questions in random order."""
    if item.captions:
        return writer.clip(PROMPT, item.captions)
    count = int(rng.integers(1, max_turns + 1))
    return writer.dialogue([item.turns[int(i)] for i in rng.permutation(len(item.turns))[:count]])


def collate(items: Sequence[Item], samples: Sequence[ChatTokens], row_tokens: int, pad: int) -> dict[str, Tensor]:
    """Arguments of the fused model: samples packed, and their pictures' features (N, C) in the same order."""
    rows = pack(samples, row_tokens, pad)
    return {
        **rows.inputs,
        "image_positions": rows.image_positions,
        "image_grid_thw": torch.tensor([(1, *items[sample].grid) for sample, _ in rows.pictures]).view(-1, 3),
        "image_features": torch.cat([items[sample].pictures[picture] for sample, picture in rows.pictures]).float(),
    }
