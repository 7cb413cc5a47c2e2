"""Steps of training on casa's own trainer, and a watch over them that is kept with every checkpoint."""

import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from casa.atomic import write_text
from casa.errors import UserError
from casa.training.config import (
    DataloaderSettings,
    LoggingSettings,
    OptimisationSettings,
    SavingSettings,
    SpikeSettings,
    TrainerSettings,
)
from casa.training.optimizer import is_inner
from casa.training.trainer import CasaTrainer
from projects.casa_tiny.stage import Batches, DrawnBatches
from projects.study.grid import Budget

LOG_EVERY, SAVES = 10, 4  # steps; checkpoints of a run


class Watch(TrainerCallback):
    """Counts the seconds of steps over all calls of a run, and calls `measure` on the way.

    Args:
        folder: Of the run's checkpoints.
        measure: Called with the steps done at each of `at`; what it gives is kept. Its time is not counted.
        at: Steps.

    Attributes:
        seconds: By the clock, of steps alone.
        cpu_seconds: Of this process, which other work on the machine does not change much.
        measured: By step, what `measure` gave.
    """

    def __init__(self, folder: Path, measure: Callable[[int], Any] | None = None, at: Sequence[int] = ()) -> None:
        self.path, self.measure, self.at = folder / "watch.json", measure, tuple(at)
        self.seconds = self.cpu_seconds = 0.0
        self.measured: dict[str, Any] = {}
        self._since: tuple[float, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        # the newest entry that is no younger than the checkpoint the run goes on from
        step = max((int(step) for step in kept if int(step) <= state.global_step), default=None)
        if step is not None and state.global_step:
            found = kept[str(step)]
            self.seconds, self.cpu_seconds, self.measured = found["seconds"], found["cpu_seconds"], found["measured"]
        if self.measure is not None and state.global_step == 0 and 0 in self.at:
            self.measured["0"] = self.measure(0)
        self._since = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._since is not None
        clock, cpu = _now()
        self.seconds += clock - self._since[0]
        self.cpu_seconds += cpu - self._since[1]
        if self.measure is not None and state.global_step in self.at:
            self.measured[str(state.global_step)] = self.measure(state.global_step)
        self._since = _now()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        kept[str(state.global_step)] = {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "measured": self.measured,
        }
        write_text(self.path, json.dumps(kept) + "\n")


def _has_matrices(model: Any) -> bool:
    """Whether matrices inside blocks are trained, which adapters are not taken for."""
    return any(is_inner(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _is_narrow(model: Any) -> bool:
    return any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def computing(model: Any) -> Any:
    """How a model computes outside of training: in bfloat16 where its frozen part is kept in that."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=_is_narrow(model))


def _now() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return perf_counter(), used.ru_utime + used.ru_stime


def train_steps(
    model: Any,
    batches: Batches,
    budget: Budget,
    seed: int,
    device: str,
    folder: Path,
    name: str,
    watch: Watch | None = None,
) -> tuple[list[tuple[int, float]], Watch]:
    """Trains what wants gradients, from the newest checkpoint in `folder` if there is one.

    Args:
        model: Gives a loss for a batch; it is left in evaluation mode.
        batches: By the step to begin at.
        budget: Steps and rates.
        seed: Of what the trainer draws.
        device: cpu or auto.
        folder: Of checkpoints.
        name: For what is printed.
        watch: Over the steps.

    Returns:
        Steps and losses, each the mean since the one before; and the watch.

    Raises:
        UserError: The run was ended by SIGTERM; called again, it goes on.
    """
    # where losses are told too, so that a run that goes on tells the same means
    every = max(LOG_EVERY, budget.steps // SAVES // LOG_EVERY * LOG_EVERY)
    settings = TrainerSettings(
        optimisation=OptimisationSettings(
            steps=budget.steps,
            warmup_steps=min(budget.warmup, budget.steps // 4),
            decay_steps=int(budget.decay * budget.steps),
            new_lr=budget.lr,
            existing_lr=budget.lr,
            muon_lr=budget.muon_lr if _has_matrices(model) else 0,
            trainable="as given",
            precision="bfloat16" if _is_narrow(model) else "float32",
        ),
        spike_detection=SpikeSettings(factor=None),  # a step of few samples is noisy
        saving=SavingSettings(every=every, keep=1),
        logging=LoggingSettings(every=LOG_EVERY, report_to=()),
        dataloader=DataloaderSettings(num_workers=0),
        seed=seed,
        device="cpu" if device == "cpu" else "auto",
    )
    # a cache would be filled for nothing, and packed rows must not have one
    model.config.use_cache = False
    watch = watch or Watch(folder)
    trainer = CasaTrainer(model.train(), DrawnBatches(batches), settings, folder, callbacks=[watch, Told(name)])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)
    if trainer.stopped:
        raise UserError(f"{name} stopped at step {trainer.state.global_step:,}; the same command goes on from there.")
    model.config.use_cache = True
    model.eval()
    curve = [(int(entry["step"]), round(entry["loss"], 5)) for entry in trainer.state.log_history if "loss" in entry]
    return curve, watch


class Told(TrainerCallback):
    """Prints how far a run is, ten times."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        tenth = max(LOG_EVERY, state.max_steps // 10 // LOG_EVERY * LOG_EVERY)
        if logs and "loss" in logs and state.global_step % tenth == 0:
            print(
                f"{self.name}: step {state.global_step:,} of {state.max_steps:,}, loss {logs['loss']:.4f}", flush=True
            )
