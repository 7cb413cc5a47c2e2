"""What the training blocks of a recipe hold: which parameters learn at what rate, and how a run is kept safe."""

import re
from dataclasses import dataclass, field
from typing import Literal

from casa.settings import require


@dataclass(frozen=True)
class OptimisationSettings:
    """AdamW, or Muon beside it, over groups of parameters whose rates rise, stay and fall (paper, section 4).

        rate      ______________
                 /              \\
            ____/                \\____      steps
              warmup             decay

    steps: updates of the whole run. accumulate: packs per process and update; their answer tokens weigh the same
    wherever they stand. warmup, decay: steps. decay_shape: of the falling part. floor: share of the rate at its end.
    new_rate: for what `adapt` added and LoRA; existing_rate: for all else that is trained. rates: further rates, by
    regular expression over parameter names, the first that is found. frozen: parameters that are not trained, likewise.
    muon: rate of Muon (casa.training.muon) for matrices inside blocks and fusion layers, new or not, that `rates` does
    not name; on the scale of AdamW's rates. 0 has AdamW train all.
    trained: "all" (paper, route a), or "added": what `adapt` added and the last `tower_blocks` blocks of the tower
    (route b); "as given" leaves requires_grad as it is.
    weight_decay: for matrices. beta1, beta2: AdamW's. clip: largest norm of the gradient, 0 for none.
    precision: "bfloat16" computes in bf16. master: keep trained weights in float32 then (recommended); otherwise
    weights and moments are bf16 as well. checkpoint_blocks: run blocks again in the backward pass, for memory.
    loss_chunk: tokens whose logits exist at once. ema: decay of a running average of the weights; None for none.
    """

    steps: int
    accumulate: int = 1
    warmup: int = 0
    decay: int = 0
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    floor: float = 0.0
    new_rate: float = 1e-4
    existing_rate: float = 1e-5
    rates: dict[str, float] = field(default_factory=dict)
    muon: float = 0.0
    trained: Literal["all", "added", "as given"] = "all"
    tower_blocks: int = 4
    frozen: tuple[str, ...] = ()
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    master: bool = True
    checkpoint_blocks: bool = False
    loss_chunk: int = 1024
    ema: float | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.accumulate >= 1, "accumulate", self.accumulate, "1 or more")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more steps")
        require(0 <= self.decay <= self.steps - self.warmup, "decay", self.decay, "at most the steps behind warmup")
        require(0 <= self.floor <= 1, "floor", self.floor, "from 0 to 1")
        require(self.new_rate >= 0, "new_rate", self.new_rate, "0 or more")
        require(self.existing_rate >= 0, "existing_rate", self.existing_rate, "0 or more")
        require(self.muon >= 0, "muon", self.muon, "0 or more")
        for name, patterns in (("rates", self.rates), ("frozen", self.frozen)):
            for pattern in patterns:
                require(_is_pattern(pattern), name, pattern, "a regular expression over names, such as '.*proj'")
        for pattern, rate in self.rates.items():
            require(rate >= 0, f"rates.{pattern}", rate, "0 or more")
        require(self.tower_blocks >= 0, "tower_blocks", self.tower_blocks, "0 or more")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "from 0 to below 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "from 0 to below 1")
        require(self.clip >= 0, "clip", self.clip, "0 or more")
        require(self.loss_chunk >= 1, "loss_chunk", self.loss_chunk, "1 token or more")
        require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "between 0 and 1")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class WatchSettings:
    """When a run stops by itself: at a loss or gradient that is no number, and at a spike.

    spike: a loss above so many times the median of the last `window` steps, and at least `least` above it; None looks
    for no spikes. Nothing is a spike before half a window has passed.
    """

    spike: float | None = 4.0
    least: float = 1.0
    window: int = 100

    def __post_init__(self) -> None:
        require(self.spike is None or self.spike > 1, "spike", self.spike, "above 1")
        require(self.window >= 2, "window", self.window, "2 steps or more")


def require_keeping(gigabytes: float, folder: str | None, workers: int) -> None:
    """Raises for `keep_gigabytes` and `keep_folder` that cannot be, or not beside so many `workers`."""
    require(gigabytes >= 0, "keep_gigabytes", gigabytes, "0 or more")
    require(folder != "", "keep_folder", folder, "the name of a folder, or null")
    wanted = "above 0 beside keep_folder, which may be null"
    require(folder is None or gigabytes > 0, "keep_gigabytes", gigabytes, wanted)
    require(not (gigabytes and workers), "workers", workers, "0, beside keep_gigabytes")


def require_whole_matrices(optimisation: OptimisationSettings, sharding: str) -> None:
    """Raises where Muon would get its matrices in parts."""
    muon = optimisation.muon
    require(not muon or sharding != "fsdp", "optimisation.muon", muon, "0 with sharding: fsdp, which splits matrices")


@dataclass(frozen=True)
class TrainerSettings:
    """A run. folder: for its checkpoints and logs. save_every: steps; keep: newest checkpoints that are kept.

    workers: processes that read data, per process that trains; ahead: batches that each reads ahead. keep_gigabytes:
    host memory for the image tokens of a frozen tower (0: none are kept); keep_folder: where other runs find them.
    seed: of what is random in training. device: "cpu" leaves accelerators alone.
    sharding: with several processes, "ddp" has all weights in each of them; "fsdp" spreads weights, gradients and
    moments over them (FSDP2).
    """

    folder: str
    optimisation: OptimisationSettings
    watch: WatchSettings = field(default_factory=WatchSettings)
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    workers: int = 0
    ahead: int = 2
    keep_gigabytes: float = 0.0
    keep_folder: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "the name of a folder")
        require(self.save_every >= 1, "save_every", self.save_every, "1 step or more")
        require(self.keep >= 1, "keep", self.keep, "1 or more")
        require(self.log_every >= 1, "log_every", self.log_every, "1 step or more")
        require(0 <= self.workers <= 256, "workers", self.workers, "from 0 to 256")
        require_keeping(self.keep_gigabytes, self.keep_folder, self.workers)
        require_whole_matrices(self.optimisation, self.sharding)
