"""What a run does per second, how full its packs are and what memory it takes: added to every line of the log."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from casa.benchmarks.host_memory import most_bytes
from casa.training.samples import Budget
from casa.training.trainer import CasaTrainer
from casa.training.trainer.ranks import mean_over_ranks

TOTALS = "casa_totals"  # where a checkpoint keeps what was counted
COUNTED = ("samples", "text_tokens", "image_tokens", "images", "learned", "dropped")


class Measures(TrainerCallback):
    """To be listed before whatever shows or records logs, which get these keys (of all processes together):

    text_tokens_per_second, images_per_second; packed_text, packed_image: share of the packs' budgets that is filled;
    memory_gib: the most that was held so far (of the first process: GPU memory, or the host's without a GPU).

    totals: what was trained on since the run began, also before it was resumed; `packs` and the keys of `COUNTED`. On
    several processes, those of this one times their number. Give `trainer` before training begins.
    """

    trainer: CasaTrainer

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._window: Counter[str] = Counter()
        self._since, self._paused = time.monotonic(), 0.0
        self._positions: dict[int, str] = {}
        self.totals: Counter[str] = Counter()

    def made(self) -> Counter[str]:
        """What became of records, as the readers of this process count it since the run began."""
        found: Counter[str] = Counter()
        for position in self._positions.values():
            found.update(json.loads(position)["counts"])
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count: for what is no training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.totals = Counter(state.stateful_callbacks.get(TOTALS, {}))
        self._window.clear()
        self._since, self._paused = time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for batch in self.trainer.batches:
            self._positions[batch.reader] = batch.position
            self._window["packs"] += 1
            self._window.update({name: batch.facts.get(name, 0) for name in COUNTED})
            self.totals["packs"] += args.world_size
            self.totals.update({name: batch.facts.get(name, 0) * args.world_size for name in COUNTED})
        state.stateful_callbacks[TOTALS] = dict(self.totals)

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
        figures["memory_gib"] = most_bytes(args.device) / 2**30
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("loss") == logs["loss"]:
            # a copy, made before callbacks were asked
            state.log_history[-1].update(figures)
        self._window = Counter()
        self._since, self._paused = now, 0.0
