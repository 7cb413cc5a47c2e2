"""Recipes: what is trained, on which data and how. Every key is known, typed and checked before anything is computed.

A recipe's file may begin with `base: other.yaml` and then holds only what differs. Blocks are merged key by key, lists
and single values replace those of the base. A base has no base of its own. YAML is read with its safe loader: a recipe
can hold plain values only, never code.
"""

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from casa.data import DataSettings
from casa.errors import UserError
from casa.models import FusionConfig
from casa.settings import Bounds, NonNegative, Positive, Rate, Settings, build, plain_values, require

_MAX_FILE = 1_000_000  # bytes; a recipe is a page of text


@dataclass(frozen=True)
class TokenBudget(Settings):
    """Tokens of one pack, at most. Image tokens are counted as the image encoder gives them, before any compressor."""

    text: Annotated[int, Bounds(ge=2)] = 2048
    image: Positive = 20_480

    def holds(self, text: int, image: int) -> bool:
        """Whether so many tokens fit."""
        return text <= self.text and image <= self.image


# the paper's, per stage and GPU (section 4)
BUDGETS = {"image": TokenBudget(2048, 20_480), "video": TokenBudget(3072, 46_080), "live": TokenBudget(3072, 30_720)}


@dataclass(frozen=True)
class OversizeSettings(Settings):
    """What happens to a record over budget.

    Attributes:
        text: If it has more text than a pack holds.
        images: If it has more image tokens. A record that stays too large although its pictures were made as small as
            `min_tokens` each is split.
    """

    text: Literal["split", "refuse"] = "split"
    images: Literal["downscale", "split", "refuse"] = "downscale"
    min_tokens: Positive = 16


@dataclass(frozen=True)
class PackingSettings(Settings):
    """How samples are packed into rows.

    Attributes:
        budget: Of one pack.
        oversize: What happens to records beyond it.
        buffer_size: Samples to choose from; fewer where they hold more than `buffer_mb` MiB of pictures (frames of
            videos), in the memory of every process that reads. More fill packs better, and are read again on resume.
        patience: Packs after which a waiting sample goes first.
    """

    budget: TokenBudget = field(default_factory=TokenBudget)
    oversize: OversizeSettings = field(default_factory=OversizeSettings)
    buffer_size: Annotated[int, Bounds(ge=1, le=100_000)] = 256
    buffer_mb: Annotated[float, Bounds(gt=0)] = 256.0
    patience: NonNegative = 16


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Adapters of low rank on the text model's matrices; its own weights and the image encoder stay as they are.

    Attributes:
        rank, alpha, dropout: Of the adapters.
        target_modules: Last parts of the names of linear layers.
        added: "full" trains the fusion layers as they are, "adapters" gives them adapters too. Projector, compressor
            and gist tokens are always trained in full.
    """

    rank: Annotated[int, Bounds(ge=1, le=4096)] = 16
    alpha: Annotated[float, Bounds(gt=0)] = 32.0
    dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    added: Literal["full", "adapters"] = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.target_modules), "target_modules", list(self.target_modules), "one name or more")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What is trained: a backbone that is given eyes now, or a CASA checkpoint that learns more.

    Attributes:
        backbone: Folder or hub name of a text-only model, of an insertion VLM, or of an insertion model of casa's own,
            whose projector counts as new.
        vision: Beside a text-only backbone: an image encoder, or a model that has one.
        checkpoint: Folder of a CASA model, or a shipped one, instead of these.
        fusion: How the backbone is fused.
        dtype: That weights are read in; what they are kept in afterwards is `optimisation.precision`. float32 loses
            nothing; bfloat16 halves the host memory that reading takes.
        processor: Folder of a processor; what the backbone's tokenizer and the encoder ask for is made if None.
        max_pixels: A picture of more is made smaller; the processor's own bound if None.
        lora: Trains adapters instead of the text model.
    """

    backbone: str | None = None
    vision: str | None = None
    checkpoint: str | None = None
    fusion: FusionConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    processor: str | None = None
    max_pixels: Annotated[int, Bounds(ge=784)] | None = None
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is None:
            require(bool(self.backbone), "backbone", self.backbone, "a folder or hub name, unless checkpoint is given")
            return
        for name in ("backbone", "vision", "fusion"):
            value = getattr(self, name)
            require(value is None, name, value, "left out, since a checkpoint has its own")

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return self.checkpoint or self.backbone or ""


@dataclass(frozen=True)
class OptimisationSettings(Settings):
    """AdamW, or Muon beside it, over groups of parameters whose learning rates rise, stay and fall (paper, section 4).

        lr        ______________
                 /              \\
            ____/                \\____      steps
             warmup              decay

    Attributes:
        steps: Updates of the whole run.
        gradient_accumulation_steps: Packs per process and update; their answer tokens weigh the same wherever they are.
        warmup_steps, decay_steps, decay_type: The schedule.
        min_lr_ratio: Share of the learning rate at its end.
        new_lr: For what `adapt` added and LoRA.
        existing_lr: For all else that is trained.
        lr_overrides: Further learning rates, by regular expression over parameter names, the first that is found.
        muon_lr: Muon's, for matrices inside blocks and fusion layers, new or not, that `lr_overrides` does not name; on
            the scale of AdamW's. 0 has AdamW train all.
        trainable: "all" (paper, route a), or "added": what `adapt` added and the last `tower_blocks` blocks of the
            image encoder (route b); "as given" leaves requires_grad as it is.
        frozen: Parameters that are not trained, by regular expression.
        weight_decay: For matrices.
        beta1, beta2: AdamW's.
        max_grad_norm: 0 clips nothing.
        precision: "bfloat16" computes in bf16.
        master_weights: Keep trained weights in float32 then (recommended); otherwise weights and moments are bf16 as
            well.
        gradient_checkpointing: Run blocks again in the backward pass, for memory.
        loss_chunk: Tokens whose logits exist at once.
        ema_decay: Of a running average of the weights; None for none.
    """

    steps: Positive
    gradient_accumulation_steps: Positive = 1
    warmup_steps: NonNegative = 0
    decay_steps: NonNegative = 0
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    min_lr_ratio: Annotated[float, Bounds(ge=0, le=1)] = 0.0
    new_lr: Rate = 1e-4
    existing_lr: Rate = 1e-5
    lr_overrides: dict[str, float] = field(default_factory=dict)
    muon_lr: Rate = 0.0
    trainable: Literal["all", "added", "as given"] = "all"
    tower_blocks: NonNegative = 4
    frozen: tuple[str, ...] = ()
    weight_decay: Rate = 0.05
    beta1: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.98
    max_grad_norm: Rate = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    master_weights: bool = True
    gradient_checkpointing: bool = False
    loss_chunk: Positive = 1024
    ema_decay: Annotated[float, Bounds(gt=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        left = self.steps - self.warmup_steps
        require(self.decay_steps <= left, "decay_steps", self.decay_steps, "at most the steps behind warmup_steps")
        for name, patterns in (("lr_overrides", self.lr_overrides), ("frozen", self.frozen)):
            for pattern in patterns:
                require(_is_pattern(pattern), name, pattern, "a regular expression over names, such as '.*proj'")
        for pattern, lr in self.lr_overrides.items():
            require(lr >= 0, f"lr_overrides.{pattern}", lr, "0 or more")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class SpikeSettings(Settings):
    """A loss or gradient that is no number stops a run, and so does a spike.

    Attributes:
        factor: A spike is a loss above so many times the median of the last `window` steps, and at least
            `min_increase` above it; None looks for no spikes. Nothing is a spike before half a window has passed.
    """

    factor: Annotated[float, Bounds(gt=1)] | None = 4.0
    min_increase: float = 1.0
    window: Annotated[int, Bounds(ge=2)] = 100


@dataclass(frozen=True)
class DataloaderSettings(Settings):
    """How data are read.

    Attributes:
        num_workers: Processes that read data, per process that trains.
        prefetch_factor: Batches that each reads ahead.
        feature_cache_gb: Host memory for the image tokens of a frozen image encoder, so that a picture is encoded once
            and not at every epoch; 0 keeps none. It needs num_workers: 0, since the cache is in one process only.
        feature_cache_dir: A folder that keeps them too, for a run that goes on, or another with the same encoder.
        frame_cache_dir: A folder in which frames of videos are kept as PNGs, so that no video is decoded twice.
    """

    num_workers: Annotated[int, Bounds(ge=0, le=256)] = 0
    prefetch_factor: Annotated[int, Bounds(ge=1, le=64)] = 2
    feature_cache_gb: Rate = 0.0
    feature_cache_dir: str | None = None
    frame_cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("feature_cache_dir", "frame_cache_dir"):
            require(getattr(self, name) != "", name, "", "the name of a folder, or null")
        size = self.feature_cache_gb
        wanted = "above 0 beside feature_cache_dir, which may be null"
        require(self.feature_cache_dir is None or size > 0, "feature_cache_gb", size, wanted)
        require(not (size and self.num_workers), "num_workers", self.num_workers, "0, beside feature_cache_gb")


@dataclass(frozen=True)
class SavingSettings(Settings):
    """A checkpoint every so many steps, of which the newest few are kept."""

    every: Positive = 500
    keep: Positive = 2


@dataclass(frozen=True)
class LoggingSettings(Settings):
    """Figures every so many steps, on screen and in "tensorboard" (out/tensorboard), "wandb", both or none."""

    every: Positive = 10
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What is measured every so many steps, and at the end; 0 measures nothing.

    Attributes:
        data: Records held out from training, read from their beginning: the loss on the first `packs` packs.
        metrics: How answers to the questions of the first `limit` rows of `data` are scored, as `casa eval` does.
        suffix, max_new_tokens: What stands behind each of these questions, and the longest answer.
        tasks: The offline tasks, `limit` examples each: of use to models that read digits, such as casa-tiny.
        max_side: Longest side of their pictures in px, of a stream's frames at least 224; the tasks' own if None.
    """

    every: NonNegative = 0
    data: DataSettings | None = None
    packs: Positive = 8
    metrics: tuple[Literal["anls", "relaxed", "exact", "vqa", "cer", "wer", "contains", "mcq", "live"], ...] = ()
    suffix: str = ""
    max_new_tokens: Positive = 64
    tasks: tuple[Literal["pages", "scenes", "stream"], ...] = ()
    limit: Positive = 50
    max_side: Annotated[int, Bounds(ge=112)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.data is not None or bool(self.tasks)
        require(not self.every or wanted, "every", self.every, "0, or beside data or tasks to measure")
        require(not self.metrics or self.data is not None, "metrics", list(self.metrics), "beside data to ask about")

    @property
    def asks(self) -> bool:
        """Whether the model is asked questions, which `train` needs a function for."""
        return bool(self.tasks or self.metrics)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Settings):
    """How a run trains and is looked after, whatever its model and data.

    Attributes:
        optimisation, spike_detection, dataloader, saving, logging: One block each.
        seed: Of everything random.
        device: "cpu" leaves accelerators alone.
        sharding: With several processes, "ddp" has all weights in each of them; "fsdp" spreads weights, gradients and
            moments over them (FSDP2).
    """

    optimisation: OptimisationSettings
    spike_detection: SpikeSettings = field(default_factory=SpikeSettings)
    dataloader: DataloaderSettings = field(default_factory=DataloaderSettings)
    saving: SavingSettings = field(default_factory=SavingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    seed: Annotated[int, Bounds(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu"] = "auto"
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        super().__post_init__()
        muon = self.optimisation.muon_lr
        whole = not muon or self.sharding != "fsdp"
        require(whole, "optimisation.muon_lr", muon, "0 with sharding: fsdp, which splits matrices")


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainerSettings):
    """A whole run on data of one's own.

    Attributes:
        name: Of the model that comes out.
        model, data, packing, evaluation: One block each.
    """

    name: str
    model: ModelSettings
    data: DataSettings
    packing: PackingSettings = field(default_factory=PackingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name.strip()), "name", self.name, "a name for the model")
        if self.model.lora is not None:
            trainable = self.optimisation.trainable
            require(trainable == "as given", "optimisation.trainable", trainable, "as given, beside model.lora")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values (JSON, YAML), which `parse_recipe` takes back."""
        names = dict.fromkeys(["name", "seed", "model", "data", "packing", *(f.name for f in dataclasses.fields(self))])
        return {name: plain_values(getattr(self, name)) for name in names}


def parse_recipe(values: Any, name: str = "the recipe") -> Recipe:
    """A recipe from plain values. name: what sentences call it.

    Raises:
        UserError: An unknown, missing, wrongly typed or impossible value.
    """
    return build(Recipe, values, what=name)


def open_recipe(source: "str | Path | Mapping[str, Any] | Recipe", changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a file or a mapping, with changes such as "optimisation.steps=2000".

    Keys of changes are dotted, entries of a list are numbered, values are as YAML reads them (text where text belongs).

    Raises:
        UserError: In one sentence, for a file that is no recipe, and for a change that fits none.
    """
    if isinstance(source, Recipe):
        source = source.to_dict()
    values = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read_recipe(Path(source))
    for change in changes:
        _change(values, change)
    return parse_recipe(values, str(source) if isinstance(source, str | Path) else "the recipe")


def _read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's plain values, laid over those of its base. UserError for what is no recipe."""
    values = _read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe; it must be a block of keys and values.")
    if "base" not in values:
        return values
    name = values.pop("base")
    if not isinstance(name, str):
        raise UserError(f"base in {path} must be the path of a recipe, not {name!r}.")
    base = _read_yaml(path.parent / name)
    if not isinstance(base, dict) or "base" in base:
        raise UserError(f"{path} is based on {name}, which must be a recipe without a base of its own.")
    return merged(base, values)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the changes put over it, block by block."""
    found = copy.deepcopy(dict(base))
    for key, value in changes.items():
        before = found.get(key)
        inner = isinstance(before, dict) and isinstance(value, Mapping)
        found[key] = merged(before or {}, value) if inner else copy.deepcopy(value)
    return found


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"There is no recipe {str(path)!r}; give the path of a YAML file, such as recipes/lora-own-data.yaml."
        )
    if path.stat().st_size > _MAX_FILE:
        raise UserError(f"{path} is larger than a recipe can be; give a YAML file of at most 1 MB.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
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


def _change(values: dict[str, Any], change: str) -> None:
    """Puts one KEY=VALUE into plain values. What is unknown or impossible is left to be refused with the rest."""
    key, equals, text = (part.strip() for part in change.partition("="))
    path = key.split(".")
    if not equals or not all(path):
        raise UserError(f"{change!r} is no setting; write it as in optimisation.steps=2000.")
    value: Any = text
    if _type_at(Recipe, path) is not str:
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{change}: {text!r} is no value that YAML can read; put it in quotes.") from error
    place: Any = values
    for depth, name in enumerate(path):
        entry: Any = name
        if isinstance(place, list):
            if not name.isdecimal() or int(name) >= len(place):
                at = ".".join(path[: depth + 1])
                raise UserError(f"{change}: {at} must be the number of an entry, from 0 to {len(place) - 1}.")
            entry = int(name)
        elif not isinstance(place, dict):
            raise UserError(f"{change}: {'.'.join(path[:depth])} is a single value, and has no {name!r} inside.")
        if depth == len(path) - 1:
            place[entry] = value
            return
        if isinstance(place, dict) and place.get(name) is None:
            place[name] = {}
        place = place[entry]


def _type_at(kind: Any, path: Sequence[str]) -> Any:
    """What a key holds, as the settings declare it; None where they do not tell."""
    for name in path:
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            plain = [entry for entry in typing.get_args(kind) if entry is not types.NoneType]
            kind = plain[0] if len(plain) == 1 else None
        if typing.get_origin(kind) in (tuple, dict):
            kind = typing.get_args(kind)[0 if typing.get_origin(kind) is tuple else 1]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:
            return None
    return kind
