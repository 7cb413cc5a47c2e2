"""What is looked at in a run: losses that jump, figures per second, scores now and then, a line of progress, curves."""

import json
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import wait_for_everyone
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from casa.atomic import replacing, write_text
from casa.errors import UserError
from casa.memory import max_memory_allocated
from casa.training.checkpoints import any_rank, mean_over_ranks
from casa.training.config import SpikeSettings
from casa.training.packed_dataset import PackedBatch, PackedDataset

if TYPE_CHECKING:
    from casa.training.trainer import CasaTrainer

Evaluate = Callable[[Any, Any], dict[str, float]]
"""From a model and its processor to scores by name."""

_REMEDY = {"tensorboard": "install casa-vlm[train]", "wandb": "pip install wandb"}


class SpikeDetector:
    """Remembers recent losses, and compares the next one with them before the weights are changed."""

    def __init__(self, settings: SpikeSettings) -> None:
        self._settings = settings
        self.recent: deque[float] = deque(maxlen=settings.window)

    def fault(self, loss: float) -> str | None:
        """What is wrong with this step's loss, or None; only a loss with nothing wrong is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        settings = self._settings
        if settings.factor is not None and len(self.recent) >= settings.window // 2:
            usual = median(self.recent)
            if loss > settings.factor * usual and loss > usual + settings.min_increase:
                return f"the loss jumped to {loss:.4g}, from about {usual:.4g}"
        self.recent.append(loss)
        return None


def save_for_inspection(
    folder: Path, step: int, rank: int, batches: Sequence[PackedBatch], **why: str | float | list[float] | None
) -> Path:
    """Writes the batches of a step that went wrong, and returns their folder.

    run/inspect-412/batch-0-0.safetensors     process 0, its first batch: what the model was called with
    run/inspect-412/facts-0.json              why, recent losses, and where its records were read
    """
    place = folder / f"inspect-{step}"
    place.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        with replacing(place / f"batch-{rank}-{number}.safetensors") as part:
            save_file({name: tensor.contiguous().clone() for name, tensor in batch.inputs.items()}, part)
    taken = [{**batch.facts, "records": list(batch.origins)} for batch in batches]
    write_text(place / f"facts-{rank}.json", json.dumps({"step": step, **why, "batches": taken}, indent=2) + "\n")
    return place


class Throughput:
    """What a run does per second, how full its packs are and what memory it takes, of all processes together."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Counts from now on."""
        self._taken: Counter[str] = Counter()
        self._since, self._paused = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count: for what is no training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def add(self, batches: Sequence[PackedBatch]) -> None:
        """Counts the batches of a step."""
        for batch in batches:
            if batch.facts:
                self._taken.update({"packs": 1, **batch.facts})

    def figures(self, dataset: PackedDataset, args: TrainingArguments) -> dict[str, float]:
        """Since the last call, or since the beginning; nothing without a step between.

        Returns:
            text_tokens_per_second and images_per_second; packed_text and packed_image, the share of the packs' budgets
            that is filled; memory_gib, the most that was held so far (of the first process: GPU memory, or the host's
            without a GPU).
        """
        taken, packs = self._taken, self._taken["packs"]
        if not packs:
            return {}
        seconds = max(1e-9, time.monotonic() - self._since - self._paused)
        budget = dataset.settings.budget
        found = {
            "text_tokens_per_second": args.world_size * taken["text_tokens"] / seconds,
            "images_per_second": args.world_size * taken["images"] / seconds,
            "packed_text": taken["text_tokens"] / (packs * budget.text),
            "packed_image": taken["image_tokens"] / (packs * budget.image),
        }
        self.begin()
        found = {name: mean_over_ranks(value, args.device) for name, value in found.items()}
        return {**found, "memory_gib": max_memory_allocated(args.device) / 2**30}


class EvaluationCallback(TrainerCallback):
    """Every `every` steps and at the end (0: never), on the first process, with averaged weights if there are any.

    Random numbers, modes and gradients are left as they were. An end is the last step, or that of the data; where
    SIGTERM breaks a run off, what has begun is finished, nothing more is begun, and scores that are not all there are
    not noted. Give `trainer` before training begins.

    Args:
        held_out: Packs whose answers' mean loss is logged as `eval_loss`; the first `packs` of them at each time.
        evaluate: Gives further scores, logged as `eval_NAME`.

    Attributes:
        scores: The last ones, by name.
    """

    trainer: "CasaTrainer"

    def __init__(
        self,
        every: int,
        held_out: Callable[[], PackedDataset] | None = None,
        packs: int = 8,
        evaluate: Evaluate | None = None,
    ) -> None:
        self._every, self._held_out, self._packs, self._evaluate = every, held_out, packs, evaluate
        self.scores: dict[str, float] = {}
        self._measured = 0  # the step of these scores

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What a checkpoint's log says of its own step need not be measured again."""
        for entry in state.log_history:
            found = _evaluated(entry)
            if self._every and found and entry["step"] == state.global_step:
                self.scores, self._measured = found, state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._every and (state.global_step % self._every == 0 or state.global_step >= state.max_steps):
            self._note(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._every and self._measured != state.global_step:
            self._note(state, control)

    def _note(self, state: TrainerState, control: TrainerControl) -> None:
        trainer = self.trainer
        if trainer.stopped:
            return
        self._measured = state.global_step
        scores: dict[str, float] | None = None
        with trainer.throughput.paused():
            # weights that are spread over processes are gathered by all of them, for the same inputs
            if state.is_world_process_zero or trainer.sharded:
                scores = self.measure()
            wait_for_everyone()
        # a signal that came meanwhile must not wait for another step
        trainer.heed_stop(control)
        if scores is None:
            return
        self.scores = scores
        if state.is_world_process_zero:
            # an entry in the log counts as the one that this step may be about to make
            wanted = control.should_log
            trainer.log({f"eval_{name}": value for name, value in scores.items()})
            control.should_log = wanted

    def measure(self) -> dict[str, float] | None:
        """Scores of the model as it is now; None if SIGTERM came before all of them were begun."""
        trainer = self.trainer
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        found: dict[str, float] = {}
        with ExitStack() as around:
            around.enter_context(torch.random.fork_rng())
            around.enter_context(torch.no_grad())
            around.enter_context(trainer.accelerator.autocast())
            if trainer.ema is not None:
                around.enter_context(trainer.ema.in_place())
            around.callback(model.train, was_training)
            model.eval()
            if self._held_out is not None:
                found["loss"] = self._loss(model, self._held_out())
            if self._evaluate is not None:
                asked = trainer.stop_signal.received
                # where all processes measure, they stop together
                if any_rank(asked, trainer.args.device) if trainer.sharded else asked:
                    return None
                found |= self._evaluate(model, trainer.processor)
        return found

    def _loss(self, model: Any, dataset: PackedDataset) -> float:
        """The mean over answer tokens, which are not the same number in every pack."""
        total, count = 0.0, 0
        for batch in islice(dataset, self._packs):
            inputs = {name: tensor.to(self.trainer.args.device) for name, tensor in batch.inputs.items()}
            learned = batch.facts["learned"]
            total += float(model(**inputs, use_cache=False).loss) * learned
            count += learned
        return total / count if count else float("nan")


def _evaluated(entry: dict[str, float]) -> dict[str, float]:
    """The scores in a line of the log, by name."""
    return {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}


class ProgressCallback(TrainerCallback):
    """Shows loss, learning rates, tokens and images per second, how full packs are, memory and time left, on stderr.

    training ━━ 1,240 of 25,000  loss 1.234  lr new 0.0001, existing 1e-05  5,300 tok/s  18.2 img/s  packed 93 / 98 %

    On a terminal a line stays in place, in a file there is one per log entry. `close` it when the run is over, however
    it ends.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began, self._first = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.completed:,} of {task.total:,}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=self._console, expand=True)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        if measured := _evaluated(logs):
            names = {"loss": "held-out loss"}
            told = "  ".join(f"{names.get(key, key)} {value:.4g}" for key, value in measured.items())
            self._console.print(f"step {state.global_step:,}: {told}")
        elif "loss" in logs and self._bar is not None:
            self._bar.update(self._task, figures=figures_line(logs))
        elif "loss" in logs:
            done = max(1, state.global_step - self._first)
            left = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
            told = f"{left / 3600:.1f} h left" if left >= 5400 else f"{left / 60:.0f} min left"
            self._console.print(f"step {state.global_step:,} of {state.max_steps:,}: {figures_line(logs)}  {told}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"saved {state.global_step:,}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def figures_line(logs: dict[str, float]) -> str:
    """The figures of a line of the log, in words."""
    told = [f"loss {logs['loss']:.4g}"]
    rates = {key.removeprefix("lr_"): value for key, value in logs.items() if key.startswith("lr_")}
    if rates:
        told.append("lr " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    if "text_tokens_per_second" in logs:
        told += [
            f"{logs['text_tokens_per_second']:,.0f} tok/s",
            f"{logs['images_per_second']:,.1f} img/s",
            f"packed {100 * logs['packed_text']:.0f} / {100 * logs['packed_image']:.0f} %",
            f"{logs['memory_gib']:.1f} GiB",
        ]
    return "  ".join(told)


def check_reporters(names: Sequence[str]) -> None:
    """Raises UserError for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"logging.report_to names {name}, which is not installed: {_REMEDY[name]}, or take it out.")


def reporters(names: Sequence[str], out: Path) -> list[TrainerCallback]:
    """Callbacks that send logs to each: TensorBoard into out/tensorboard, Weights & Biases online.

    Raises:
        UserError: One is not installed.
    """
    check_reporters(names)
    # transformers loads them only where a run asks for them
    from transformers.integrations import TensorBoardCallback
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    found: list[TrainerCallback] = [kind() for kind in get_reporting_integration_callbacks(list(dict.fromkeys(names)))]
    for callback in found:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(out / "tensorboard")
    return found
