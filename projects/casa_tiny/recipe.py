"""The recipe of casa-tiny as typed settings; every key is known and checked before anything is computed."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from casa.errors import UserError
from casa.models import FusionConfig
from casa.settings import build, near, require
from projects.casa_tiny.targets import CHANNELS
from projects.casa_tiny.tasks import CLIPS, PICTURES

RECIPE = Path(__file__).with_name("casa-tiny.yaml")
CELL = 28  # px of an image token's side


@dataclass(frozen=True)
class Optimisation:
    """AdamW, and Muon for the matrices inside blocks; the learning rate rises, stays and falls.

    Args:
        steps: Updates of the stage.
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate; 0 leaves all to AdamW.
        warmup: Steps in which the rate rises.
        decay: Share of the steps, at the end, in which it falls.
        weight_decay: For matrices.
        clip: Largest gradient norm.
    """

    steps: int
    lr: float = 1e-3
    muon_lr: float = 0.0
    warmup: int = 50
    decay: float = 0.4
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.muon_lr >= 0, "muon_lr", self.muon_lr, "0 or more")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(0 <= self.decay <= 1, "decay", self.decay, "from 0 to 1")

    def factor(self, step: int) -> float:
        """The share of the learning rates, above 0, that step 0, 1, ... is done with."""
        rising = (step + 1) / max(1, self.warmup)
        falling = 1.0 if self.decay <= 0 else (self.steps - step) / max(1.0, self.decay * self.steps)
        return max(1e-3, min(rising, falling, 1.0))


@dataclass(frozen=True)
class TextStage:
    """The text model, from nothing, on the tasks' own text.

    Args:
        model: Keys of transformers' LlamaConfig.
        optimisation: The stage's steps.
        vocabulary: Tokens at most.
        documents: Examples drawn for their text.
        samples: Samples of a step.
        row_tokens: Tokens of a packed row.
        max_turns: Questions of a sample.
    """

    model: dict[str, Any]
    optimisation: Optimisation
    vocabulary: int = 400
    documents: int = 1000
    samples: int = 40
    row_tokens: int = 256
    max_turns: int = 8

    def __post_init__(self) -> None:
        require(self.vocabulary >= 262, "vocabulary", self.vocabulary, "262 or more (bytes and special tokens)")


@dataclass(frozen=True)
class Sizes:
    """Until `until` (share of the stage's steps), pictures have sides of smallest..largest px.

    Args:
        until: Share of the stage's steps.
        smallest: Shortest side, px.
        largest: Longest side, px.
        patches: Patches of a step, about; the stage's own number if None.
    """

    until: float
    smallest: int
    largest: int
    patches: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.until <= 1, "until", self.until, "above 0, at most 1")
        _check_sides(self.smallest, self.largest)


@dataclass(frozen=True)
class TowerStage:
    """The image tower, on dense targets.

    Args:
        model: Keys of transformers' Qwen2_5_VLVisionConfig.
        optimisation: The stage's steps.
        mix: Share of each source.
        sizes: Sizes of pictures, in order of time.
        channels: Weight of each dense target in the loss.
        patches: Patches of a step, about.
        exact: Channels in which every cell counts alike: targets that are right in one cell and wrong in the next.
        smoothing: Of labels, in the other channels.
    """

    model: dict[str, Any]
    optimisation: Optimisation
    mix: dict[str, float]
    sizes: tuple[Sizes, ...]
    channels: dict[str, float]
    patches: int = 2304
    exact: tuple[str, ...] = ()
    smoothing: float = 0.05

    def __post_init__(self) -> None:
        _check_shares("mix", self.mix, PICTURES)
        _check_shares("channels", self.channels, CHANNELS)
        require(bool(self.sizes), "sizes", list(self.sizes), "one entry or more")
        for name in self.exact:
            require(name in self.channels, "exact", name, f"one of the channels ({', '.join(self.channels)})")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "from 0 to below 1")


@dataclass(frozen=True)
class FusionStage:
    """CASA layers, projector and text model together, on answers; the tower's output is kept in a pool.

    Args:
        optimisation: The stage's steps.
        mix: How often a step draws fresh pictures from each source.
        batch: Items of each source in a step, picked from the pool.
        fusion: A FusionConfig.
        fresh_patches: Patches drawn for a step, about.
        smallest: Shortest side of a picture, px.
        largest: Longest side of a picture, px.
        pool_draws: Steps whose pictures the pool holds.
        prefill: Draws before the first step.
        max_turns: Questions of a picture in a step.
        row_tokens: Tokens of a packed row.
        dropout: Share of the tower's output that a step hides.
    """

    optimisation: Optimisation
    mix: dict[str, float]
    batch: dict[str, int]
    fusion: FusionConfig = field(default_factory=FusionConfig)
    fresh_patches: int = 2000
    smallest: int = 112
    largest: int = 672
    pool_draws: int = 1500
    prefill: int = 50
    max_turns: int = 6
    row_tokens: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_shares("mix", self.mix, [*PICTURES, *CLIPS])
        _check_shares("batch", self.batch, self.mix)
        _check_sides(self.smallest, self.largest)
        require(self.prefill >= 1, "prefill", self.prefill, "1 or more")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Args:
        name: Of the model.
        text: The first stage.
        tower: The second stage.
        fusion: The third stage.
        seed: Of everything random.
        threads: Of the computation; 0 leaves torch's choice.
        workers: 1 draws pictures ahead in a process of its own; 0 draws them in place.
    """

    name: str
    text: TextStage
    tower: TowerStage
    fusion: FusionStage
    seed: int = 1
    threads: int = 2
    workers: int = 1

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.threads >= 0, "threads", self.threads, "0 or more")
        require(self.workers in (0, 1), "workers", self.workers, "0 or 1")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, which `parse_recipe` takes back."""
        values = dataclasses.asdict(self)
        values["fusion"]["fusion"] = self.fusion.fusion.to_dict()
        return values


def load_recipe(path: Path = RECIPE) -> Recipe:
    """Reads a recipe.

    Raises:
        UserError: The file holds an unknown, missing, wrongly typed or impossible value.
    """
    return parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values; UserError as `load_recipe`."""
    return build(Recipe, values, what="the recipe")


def _check_shares(where: str, shares: Mapping[str, float], known: Iterable[str]) -> None:
    require(bool(shares), where, dict(shares), "a block with at least one entry")
    for name, share in shares.items():
        if name not in known:
            raise UserError(f"{where} names {name!r}, which does not exist; {near(name, known, 'choose from')}")
        require(share > 0, f"{where}.{name}", share, "above 0")


def _check_sides(smallest: int, largest: int) -> None:
    for name, side in (("smallest", smallest), ("largest", largest)):
        require(side > 0 and side % CELL == 0, name, side, f"a multiple of {CELL} px")
    require(smallest <= largest, "smallest", smallest, f"at most largest ({largest})")
