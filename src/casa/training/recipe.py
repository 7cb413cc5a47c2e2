"""Recipes: a training run as data. Every key is known, typed and checked before anything is computed.

YAML is read with its safe loader: a recipe can hold plain values only, never code. An unknown key is an error
with a suggestion, so a typo never trains for hours.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from casa.errors import UserError
from casa.models import FusionConfig
from casa.settings import build, require

_LARGEST_FILE = 1_000_000  # bytes; a recipe is a page of text


@dataclass(frozen=True)
class Optimisation:
    """steps: updates. rate: AdamW's learning rate. muon: Muon's, for the matrices inside blocks; 0 leaves them
    to AdamW. warmup: steps. decay: share of the steps, at the end. clip: largest gradient norm."""

    steps: int
    rate: float = 1e-3
    muon: float = 0.0
    warmup: int = 50
    decay: float = 0.4
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.rate > 0, "rate", self.rate, "above 0")
        require(self.muon >= 0, "muon", self.muon, "0 or more")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(0 <= self.decay <= 1, "decay", self.decay, "from 0 to 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "clip", self.clip, "above 0")


@dataclass(frozen=True)
class TextStage:
    """The text model, from nothing, on the tasks' own text.

    model: keys of transformers' LlamaConfig. vocabulary: tokens at most. documents: examples drawn for their
    text. samples, row_tokens: per step, and per packed row. most_turns: questions per sample at most.
    """

    model: dict[str, Any]
    optimisation: Optimisation
    vocabulary: int = 400
    documents: int = 1000
    samples: int = 40
    row_tokens: int = 256
    most_turns: int = 8

    def __post_init__(self) -> None:
        require(self.vocabulary >= 262, "vocabulary", self.vocabulary, "262 or more (bytes and special tokens)")
        for name in ("documents", "samples", "row_tokens", "most_turns"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class Sizes:
    """Until `until` (share of the stage's steps), pictures have sides of smallest..largest px.

    patches: per step, about; the stage's own number if None. Large pictures are few in a step of few patches.
    """

    until: float
    smallest: int
    largest: int
    patches: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.until <= 1, "until", self.until, "above 0, at most 1")
        _check_sides(self.smallest, self.largest)
        require(self.patches is None or self.patches >= 16, "patches", self.patches, "16 or more")


@dataclass(frozen=True)
class TowerStage:
    """The image tower, on dense targets.

    model: keys of transformers' Qwen2_5_VLVisionConfig. mix: share of each source. sizes: what sides, when.
    patches: per step, about. channels: weight of each dense target in the loss. exact: channels in which every cell
    counts alike, for targets that are right in one cell and wrong in the next. smoothing: of labels, elsewhere.
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
        _check_shares("mix", self.mix)
        _check_shares("channels", self.channels)
        require(bool(self.sizes), "sizes", list(self.sizes), "one entry or more")
        require(self.patches >= 16, "patches", self.patches, "16 or more")
        for name in self.exact:
            require(name in self.channels, "exact", name, f"one of the channels ({', '.join(self.channels)})")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "from 0 to below 1")


@dataclass(frozen=True)
class FusionStage:
    """CASA layers, projector and text model together, on answers.

    fusion: a FusionConfig. mix: how often a step draws fresh pictures from each source. fresh_patches: about how
    many per step. batch: items of each source per step, picked from a pool that holds the last `pool_draws` draws
    and is filled with `prefill` of them before the first step. most_turns: questions per picture and step.
    dropout: share of the tower's output that a step hides.
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
    most_turns: int = 6
    row_tokens: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_shares("mix", self.mix)
        _check_shares("batch", self.batch)
        for name in self.batch:
            require(name in self.mix, "batch", name, f"a source of the mix ({', '.join(self.mix)})")
        _check_sides(self.smallest, self.largest)
        for name in ("fresh_patches", "pool_draws", "most_turns", "row_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.prefill >= 1, "prefill", self.prefill, "1 or more")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    seed: of everything random. threads: of the computation; 0 leaves torch's choice. workers: processes that draw
    pictures ahead; 0 draws them in place.
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
        require(0 <= self.workers <= 64, "workers", self.workers, "from 0 to 64")


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe. UserError, in one sentence, for a file that is missing, no safe YAML, or no recipe."""
    return parse_recipe(read_yaml(path))


def read_yaml(path: str | Path) -> Any:
    """The plain values in a recipe's file. UserError for a file that is missing, too large, or no safe YAML."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no recipe {str(path)!r}; give the path of a YAML file, such as recipes/casa-tiny.yaml."
        )
    if path.stat().st_size > _LARGEST_FILE:
        raise UserError(f"{path} is larger than a recipe can be; give a YAML file of at most 1 MB.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(
            f"{path} holds a YAML tag that could run code{place}; a recipe may hold plain values only."
        ) from error
    # a date that no calendar has is a bare ValueError to PyYAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" near line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{place}; mend it there.") from error
    return values


def parse_recipe(values: Any) -> Recipe:
    """A recipe from plain values. UserError for an unknown, missing, wrongly typed or impossible one."""
    return build(Recipe, values, what="the recipe")


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, which `parse_recipe` takes back."""
    values = dataclasses.asdict(recipe)
    values["fusion"]["fusion"] = recipe.fusion.fusion.to_dict()
    return values


def _check_shares(name: str, shares: Mapping[str, float]) -> None:
    require(bool(shares), name, dict(shares), "a block with at least one entry")
    for key, share in shares.items():
        require(share > 0, f"{name}.{key}", share, "above 0")


def _check_sides(smallest: int, largest: int) -> None:
    for name, side in (("smallest", smallest), ("largest", largest)):
        require(side > 0 and side % 28 == 0, name, side, "a multiple of 28 px")
    require(smallest <= largest, "smallest", smallest, f"at most largest ({largest})")
