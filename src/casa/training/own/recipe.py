"""RunRecipe: what is trained, on which data, how, and what is seen of it; plain values, all keys known and typed.

model, data, packing, optimisation      what is learned from what (docs/data.md, docs/training.md)
watch, saving, logging, evaluation      how a run is looked after
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from casa.data import DataSettings
from casa.models import FusionConfig
from casa.settings import build, require
from casa.training.packs import PackingSettings
from casa.training.trainer import OptimisationSettings, TrainerSettings, WatchSettings
from casa.training.trainer.settings import require_keeping, require_whole_matrices

Reporter = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of low rank on the text model's matrices; its own weights and the image tower stay as they are.

    rank, alpha, dropout: of the adapters. targets: last parts of the names of linear layers.
    added: what the fusion layers get: "whole" trains them as they are, "adapters" gives them adapters too. Projector,
    compressor and gist tokens are always trained whole.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    added: Literal["whole", "adapters"] = "whole"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 4096, "rank", self.rank, "from 1 to 4096")
        require(self.alpha > 0, "alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        require(bool(self.targets), "targets", list(self.targets), "one name or more")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained: a backbone that is given eyes now, or a CASA checkpoint that learns more.

    backbone: folder or hub name of a text-only model (with `vision`: an image encoder, or a model that has one), of an
    insertion VLM, or of an insertion model of casa's own, whose projector counts as new. fusion: how it is fused.
    checkpoint: folder of a CASA model, or a shipped one, instead of these.
    dtype: that weights are read in; what they are kept in afterwards is `optimisation.precision`. float32 loses
    nothing; bfloat16 halves the host memory that reading takes.
    processor: folder of a processor to use; what the backbone's tokenizer and the encoder ask for is made if None.
    max_pixels: a picture of more is made smaller; the processor's own bound if None.
    """

    backbone: str | None = None
    vision: str | None = None
    checkpoint: str | None = None
    fusion: FusionConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    processor: str | None = None
    max_pixels: int | None = None
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            require(bool(self.backbone), "backbone", self.backbone, "a folder or hub name, unless checkpoint is given")
        else:
            for name in ("backbone", "vision", "fusion"):
                value = getattr(self, name)
                require(value is None, name, value, "left out, since a checkpoint has its own")
        require(
            self.max_pixels is None or self.max_pixels >= 784, "max_pixels", self.max_pixels, "784 (28 x 28) or more"
        )

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return self.checkpoint or self.backbone or ""


@dataclass(frozen=True)
class SavingSettings:
    """A checkpoint every so many steps, of which the newest few are kept."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "1 step or more")
        require(self.keep >= 1, "keep", self.keep, "1 or more")


@dataclass(frozen=True)
class LoggingSettings:
    """Figures every so many steps, on screen and to: "tensorboard" (out/tensorboard), "wandb", both or none."""

    every: int = 10
    to: tuple[Reporter, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "1 step or more")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured every so many steps, and at the end; 0 measures nothing.

    data: records held out from training, read from their beginning: the loss on the first `packs` packs.
    tasks: the offline tasks, `limit` examples each: of use to models that read digits, such as casa-tiny. largest:
    longest side of their pictures in px, 112 or more, of a stream's frames at least 224; the tasks' own if left out.
    """

    every: int = 0
    data: DataSettings | None = None
    packs: int = 8
    tasks: tuple[Literal["pages", "scenes", "stream"], ...] = ()
    limit: int = 50
    largest: int | None = None

    def __post_init__(self) -> None:
        require(self.largest is None or self.largest >= 112, "largest", self.largest, "112 px or more, or null")
        require(self.every >= 0, "every", self.every, "0 steps or more")
        require(self.packs >= 1, "packs", self.packs, "1 or more")
        require(self.limit >= 1, "limit", self.limit, "1 or more")
        wanted = self.data is not None or bool(self.tasks)
        require(not self.every or wanted, "every", self.every, "0, or beside data or tasks to measure")


@dataclass(frozen=True)
class LoadingSettings:
    """workers: processes that read data, per process that trains. ahead: batches that each reads ahead.

    keep_gigabytes: host memory for the image tokens of a frozen tower, so that a picture is encoded once and not at
    every epoch; 0 keeps none. It needs workers: 0, since what was kept is at hand in one process only. keep_folder: a
    folder that keeps them too, so that a run that goes on, or another with the same tower, encodes no picture again.
    keep_frames: a folder in which frames of videos are kept as PNGs, so that no video is decoded twice.
    """

    workers: int = 0
    ahead: int = 2
    keep_gigabytes: float = 0.0
    keep_folder: str | None = None
    keep_frames: str | None = None

    def __post_init__(self) -> None:
        require_keeping(self.keep_gigabytes, self.keep_folder, self.workers)
        require(self.keep_frames != "", "keep_frames", self.keep_frames, "the name of a folder, or null")
        require(0 <= self.workers <= 256, "workers", self.workers, "from 0 to 256")
        require(1 <= self.ahead <= 64, "ahead", self.ahead, "from 1 to 64")


@dataclass(frozen=True)
class RunRecipe:
    """A whole run on data of one's own. name: of the model that comes out. seed: of everything random.

    device: "cpu" leaves accelerators alone. sharding: with several processes, "ddp" has all weights in each of them,
    "fsdp" spreads weights, gradients and moments over them (FSDP2).
    """

    name: str
    model: ModelSettings
    data: DataSettings
    optimisation: OptimisationSettings
    packing: PackingSettings = field(default_factory=PackingSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    loading: LoadingSettings = field(default_factory=LoadingSettings)
    saving: SavingSettings = field(default_factory=SavingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "name", self.name, "a name for the model")
        require(0 <= self.seed < 2**31, "seed", self.seed, "from 0 to 2147483647")
        require_whole_matrices(self.optimisation, self.sharding)
        if self.model.lora is not None:
            trained = self.optimisation.trained
            require(trained == "as given", "optimisation.trained", trained, "as given, beside model.lora")

    def trainer_settings(self, out: str) -> TrainerSettings:
        """The same, as CasaTrainer takes it."""
        return TrainerSettings(
            folder=out,
            optimisation=self.optimisation,
            watch=self.watch,
            save_every=self.saving.every,
            keep=self.saving.keep,
            log_every=self.logging.every,
            workers=self.loading.workers,
            ahead=self.loading.ahead,
            keep_gigabytes=self.loading.keep_gigabytes,
            keep_folder=self.loading.keep_folder,
            seed=self.seed,
            device=self.device,
            sharding=self.sharding,
        )


def parse_run_recipe(values: Any) -> RunRecipe:
    """From plain values. UserError for an unknown, missing, wrongly typed or impossible one."""
    return build(RunRecipe, values, what="the recipe")


def run_recipe_values(recipe: RunRecipe) -> dict[str, Any]:
    """The recipe as plain values (JSON, YAML), which `parse_run_recipe` takes back."""
    values = _plain(dataclasses.asdict(recipe))
    if recipe.model.fusion is not None:
        values["model"]["fusion"] = recipe.model.fusion.to_dict()
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
