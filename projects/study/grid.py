"""A study as data: what is made once, the budget, and the runs, group by group, in the order in which they are done.

groups:
  - name: main                     # every group is done before the next, a seed before the next seed
    tasks: single                  # a name of `tasks`
    seeds: [1, 2, 3]
    runs:                          # each a FusionConfig by name; {} is CASA⊕ in every block
      casa: {}
      insertion: {method: insertion}
  - name: placement
    tasks: single
    grid: {placement: [before], every: [1, 2, 4]}     # all combinations: "placement-before-1" and so on
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml

from casa.errors import UserError
from casa.models import FusionConfig
from casa.settings import Bounds, NonNegative, Positive, Rate, Settings, build, near, require
from projects.study.tasks import TASKS


@dataclass(frozen=True)
class Budget(Settings):
    """How long a model is trained, and how.

    Args:
        steps: Updates.
        samples: Of a step.
        lr: AdamW's learning rate; of all that is trained.
        muon_lr: Muon's, for matrices inside blocks; 0 leaves all to AdamW.
        warmup: Steps in which the rates rise.
        decay: Share of the steps, at the end, in which they fall.
        most_turns: Questions of a sample, 1 to so many.
        dropout: Share of the image features that a step hides.
        row_tokens: Tokens of a packed row.
    """

    steps: Positive
    samples: Positive = 32
    lr: Rate = 1.5e-3
    muon_lr: Rate = 5e-3
    warmup: NonNegative = 30
    decay: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    most_turns: Positive = 6
    dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    row_tokens: Positive = 512


@dataclass(frozen=True)
class Shared(Settings):
    """What all runs begin from, made once.

    Args:
        seed: Of all of it.
        pictures: By split, how many of each kind.
        parts: At the real scale, the folder of `projects.casa_smol.parts`; what follows is of the small one.
        side: px of a picture's sides.
        text: Keys of transformers' LlamaConfig.
        text_budget: Of the text model.
        vocabulary: Tokens at most.
    """

    pictures: dict[str, dict[str, int]]
    parts: str = ""
    text: dict[str, Any] = field(default_factory=dict)
    text_budget: Budget = field(default_factory=lambda: Budget(6000))
    seed: NonNegative = 1
    side: Positive = 112
    vocabulary: Positive = 400


@dataclass(frozen=True)
class TaskSet(Settings):
    """Tasks that a model is trained on together. weights: shares. questions: held out, of each."""

    weights: dict[str, float]
    questions: dict[str, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, names in (("weights", self.weights), ("questions", self.questions)):
            for name in names:
                if name not in TASKS:
                    raise UserError(f"{where} names {name!r}, which is no task; {near(name, TASKS, 'choose from')}")


@dataclass(frozen=True)
class Group(Settings):
    """Runs that belong together.

    Args:
        name: Of the group.
        tasks: What they are trained and asked on.
        runs: A fusion's fields by the run's name; at the real scale `lora` too, the rank of the text model's adapters.
        grid: Values of a fusion's fields, all of whose combinations are runs.
        seeds: Of each run.
        budget: Changes to the study's budget.
        inspect: Names of runs whose attention is looked at and whose parts are taken out.
    """

    name: str
    tasks: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    budget: dict[str, Any] = field(default_factory=dict)
    inspect: tuple[str, ...] = ()

    def fusions(self) -> dict[str, dict[str, Any]]:
        """Every run's fusion by its name."""
        found = dict(self.runs)
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            found["-".join([self.name, *map(_written, values)])] = dict(zip(self.grid, values, strict=True))
        return found


def _written(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value).replace(":", "-").replace("_", "-")


@dataclass(frozen=True)
class Run:
    """One model that is trained and scored. name: unique together with the seed. lora: rank of adapters, 0: none."""

    group: str
    name: str
    seed: int
    fusion: FusionConfig
    tasks: str
    budget: Budget
    inspect: bool
    lora: int = 0

    @property
    def id(self) -> str:
        """The name of its folder and of its record."""
        return f"{self.name}-seed-{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which a record keeps: a run whose values have changed is another one."""
        values = vars(self) | {"fusion": self.fusion.to_dict(), "budget": vars(self.budget)}
        names = ("group", "name", "seed", "tasks", "fusion", "budget", *(["lora"] if self.lora else []))
        return {name: values[name] for name in names}


@dataclass(frozen=True)
class Study(Settings):
    """A whole study.

    Args:
        name: Of the study.
        shared: What all runs begin from.
        budget: Of every run, unless its group changes it.
        tasks: Sets of tasks by name.
        groups: What is run, in order.
        device: cpu, or auto for an accelerator.
    """

    name: str
    shared: Shared
    budget: Budget
    tasks: dict[str, TaskSet]
    groups: tuple[Group, ...]
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in self.groups:
            where = f"the group {group.name!r}"
            if group.tasks not in self.tasks:
                raise UserError(f"{where} has the tasks {group.tasks!r}; {near(group.tasks, self.tasks)}")
            require(bool(group.runs or group.grid), where, "empty", "given runs or a grid")
            for name in group.inspect:
                if name not in group.fusions():
                    raise UserError(f"{where} inspects {name!r}, which it does not run; {near(name, group.fusions())}")
        require(bool(self.shared.text or self.shared.parts), "shared", "empty", "given text, or parts")
        names = [run.id for run in self.runs()]
        for name in names:
            require(names.count(name) == 1, "groups", name, "a name of one run only")

    def runs(self) -> list[Run]:
        """All runs in their order."""
        found = []
        for group in self.groups:
            budget = build(Budget, vars(self.budget) | group.budget, at=f"groups.{group.name}.budget")
            for seed in group.seeds:
                for name, values in group.fusions().items():
                    fusion = build(FusionConfig, {k: v for k, v in values.items() if k != "lora"}, "fusion")
                    shown, lora = name in group.inspect, values.get("lora", 0)
                    require(isinstance(lora, int) and lora >= 0, "lora", lora, "a whole number, 0 or more")
                    found.append(Run(group.name, name, seed, fusion, group.tasks, budget, shown, lora))
        return found


def read_study(path: Path) -> Study:
    """Reads a study. Raises UserError for an unknown, missing or impossible value."""
    if not path.is_file():
        raise UserError(f"there is no study at {path}; give a YAML file such as projects/study/small.yaml.")
    values: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return build(Study, values, what="the study")
