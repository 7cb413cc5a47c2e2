"""What a run does per second, how full its packs are and what memory it takes: added to every line of the log."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from casa.memory import max_memory_allocated
from casa.training.samples import Budget
from casa.training.trainer import CasaTrainer
from casa.training.trainer.ranks import mean_over_ranks


class Measures(TrainerCallback):
    """To be listed before whatever shows or records logs, which get these keys (of all processes together):

    text_tokens_per_second, images_per_second; packed_text, packed_image: share of the packs' budgets that is filled;
    memory_gib: the most that was held so far (of the first process: GPU memory, or the host's without a GPU).

    Give `trainer` before training begins.
    """

    trainer: CasaTrainer

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._window: Counter[str] = Counter()
        self._since, self._paused = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count: for what is no training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._window.clear()
        self._since, self._paused = time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for batch in self.trainer.batches:
            self._window.update({"packs": 1, **batch.facts})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or not self._window["packs"]:
            return
        found, now = self._window, time.monotonic()
        seconds = max(1e-9, now - self._since - self._paused)
        packs = found["packs"]
        figures = {
            "text_tokens_per_second": args.world_size * found["text_tokens"] / seconds,
            "images_per_second": args.world_size * found["images"] / seconds,
            "packed_text": found["text_tokens"] / (packs * self._budget.text),
            "packed_image": found["image_tokens"] / (packs * self._budget.image),
        }
        figures = {name: mean_over_ranks(value, args.device) for name, value in figures.items()}
        figures["memory_gib"] = max_memory_allocated(args.device) / 2**30
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("loss") == logs["loss"]:
            # a copy, made before callbacks were asked
            state.log_history[-1].update(figures)
        self._window = Counter()
        self._since, self._paused = now, 0.0
