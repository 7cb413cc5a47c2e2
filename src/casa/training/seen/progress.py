"""How a run goes, for people: a line that stays in place on a terminal, a line per log entry in a file.

training ━━ 1,240 of 25,000  loss 1.234  rate new 0.0001, existing 1e-05  5,300 tok/s  18.2 img/s  packed 93 / 98 %  ...
"""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from casa.training.trainer import CasaTrainer


class ProgressShown(TrainerCallback):
    """Shows loss, rates, tokens and images per second, how full packs are, memory and time left, on standard error.

    To be listed after `Measures`. Give `trainer` before training begins, and `close` when it is over, however it ends.
    """

    trainer: CasaTrainer

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._began, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.completed:,} of {task.total:,}"),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=self._console, expand=True)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, told="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        measured = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if measured:
            names = {"loss": "held-out loss"}
            told = "  ".join(f"{names.get(key, key)} {value:.4g}" for key, value in measured.items())
            self._console.print(f"step {state.global_step:,}: {told}")
        elif "loss" in logs:
            told = figures_told(logs)
            if self._bar is not None:
                self._bar.update(self._task, told=told)
            else:
                self._console.print(f"step {state.global_step:,} of {state.max_steps:,}: {told}  {self._left(state)}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"saved {state.global_step:,}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._began) / max(1, done) * (state.max_steps - state.global_step)
        return f"{seconds / 3600:.1f} h left" if seconds >= 5400 else f"{seconds / 60:.0f} min left"


def figures_told(logs: dict[str, Any]) -> str:
    """The figures of a line of the log, in words."""
    told = [f"loss {logs['loss']:.4g}"]
    rates = {key.removeprefix("rate_"): value for key, value in logs.items() if key.startswith("rate_")}
    if rates:
        told.append("rate " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    if "text_tokens_per_second" in logs:
        told += [
            f"{logs['text_tokens_per_second']:,.0f} tok/s",
            f"{logs['images_per_second']:,.1f} img/s",
            f"packed {100 * logs['packed_text']:.0f} / {100 * logs['packed_image']:.0f} %",
            f"{logs['memory_gib']:.1f} GiB",
        ]
    return "  ".join(told)
