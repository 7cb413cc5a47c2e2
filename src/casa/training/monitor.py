"""What is looked at in a run at every step: losses that jump, figures per second, batches that went wrong."""

import json
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from safetensors.torch import save_file
from transformers import TrainingArguments

from casa.atomic import replacing, write_text
from casa.memory import max_memory_allocated
from casa.training.checkpoints import mean_over_ranks
from casa.training.config import SpikeSettings, TokenBudget
from casa.training.packed_dataset import PackedBatch, PackedDataset


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


class Throughput:
    """What a run does per second, how full its packs are and what memory it takes, of all processes together.

    text_tokens_per_second, images_per_second; packed_text, packed_image: share of the packs' budgets that is filled;
    memory_gib: the most that was held so far (of the first process: GPU memory, or the host's without a GPU).
    """

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
        """Since the last call, or since the beginning; nothing without a step between."""
        taken, packs = self._taken, self._taken["packs"]
        if not packs:
            return {}
        seconds = max(1e-9, time.monotonic() - self._since - self._paused)
        budget: TokenBudget = dataset.settings.budget
        found = {
            "text_tokens_per_second": args.world_size * taken["text_tokens"] / seconds,
            "images_per_second": args.world_size * taken["images"] / seconds,
            "packed_text": taken["text_tokens"] / (packs * budget.text),
            "packed_image": taken["image_tokens"] / (packs * budget.image),
        }
        self.begin()
        found = {name: mean_over_ranks(value, args.device) for name, value in found.items()}
        return {**found, "memory_gib": max_memory_allocated(args.device) / 2**30}


def save_for_inspection(
    folder: Path,
    step: int,
    rank: int,
    batches: Sequence[PackedBatch],
    fault: str,
    loss: float | None,
    recent: list[float],
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
    facts = {
        "step": step,
        "fault": fault,
        "loss": repr(loss),
        "recent": recent,
        "batches": [{**batch.facts, "records": list(batch.origins)} for batch in batches],
    }
    write_text(place / f"facts-{rank}.json", json.dumps(facts, indent=2) + "\n")
    return place
