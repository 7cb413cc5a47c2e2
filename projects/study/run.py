"""One run of a study: a fused model trained from what is shared, scored on the held-out questions, and its record.

folder/records/NAME-seed-N.json    the finished run, whole or not there
folder/runs/NAME-seed-N/           checkpoints of an unfinished one; gone when it is done
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from casa.atomic import write_text
from casa.provenance import provenance
from projects.study.grid import Run, Study
from projects.study.scoring import attention, inspect, part_of, score
from projects.study.shared import Beginning
from projects.study.tasks import held_out, training_batch
from projects.study.training import Watch, computing, train_steps

QUESTIONS_SEED = 2026
ON_THE_WAY, LOOKED_AT = 40, 6  # questions and cases of a task while a model is trained
QUARTERS = 4


def record_path(folder: Path, run: Run) -> Path:
    """Where the record of a finished run is."""
    return folder / "records" / f"{run.id}.json"


def is_done(folder: Path, run: Run) -> bool:
    """Whether the folder holds the record of this very run; one with other settings does not count."""
    path = record_path(folder, run)
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["run"] == plain(run.to_dict())


def plain(values: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(values, default=vars))


def train_run(study: Study, run: Run, beginning: Beginning, folder: Path) -> dict[str, Any]:
    """Trains and scores a run, from its newest checkpoint if there is one, and writes its record.

    Raises:
        UserError: It was ended by SIGTERM; called again, it goes on.
    """
    tasks, budget = study.tasks[run.tasks], run.budget
    model = beginning.model(run.fusion, 1000 + run.seed, run.lora)
    device = "cuda" if study.device == "auto" and torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type]
    questions = held_out(tasks.questions, beginning.banks["held_out"], QUESTIONS_SEED)
    batches = Batches(run, study, beginning, model.gist_ids)
    counted = {name: sum(p.numel() for p in model.parameters() if wanted(p)) for name, wanted in _COUNTED.items()}
    fused = sum(p.numel() for p in model.casa_layers.parameters())
    flops = step_flops(model, next(batches(0)), device)

    def measure(step: int) -> dict[str, Any]:
        model.eval()
        asked = part_of(questions, ON_THE_WAY)
        found: dict[str, Any] = {"scores": score(model, beginning, asked).by_task(asked)}
        if run.inspect:
            found["attention"] = attention(model, beginning, part_of(questions, LOOKED_AT))
        model.train()
        return found

    at = sorted({round(budget.steps * quarter / QUARTERS) for quarter in range(QUARTERS)})
    checkpoints = claim_folder(folder, run)
    watch = Watch(checkpoints, measure, at)
    curve, watch = train_steps(model, batches, budget, run.seed, study.device, checkpoints, run.id, watch)
    record = {
        "study": study.name,
        "run": plain(run.to_dict()),
        **provenance(device),
        **beginning.fingerprints,
        "parameters": counted | {"fusion_layers": fused},
        "step_gflop": round(flops / 1e9, 3),
        "seconds": round(watch.seconds, 1),
        "cpu_seconds": round(watch.cpu_seconds, 1),
        "curve": curve,
        "on_the_way": watch.measured,
        "scores": score(model, beginning, questions).by_kind(questions),
    }
    if run.inspect:
        record |= inspect(model, beginning, questions)
    path = record_path(folder, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def claim_folder(folder: Path, run: Run) -> Path:
    """The folder of a run's checkpoints, emptied where they are of a run with other settings."""
    checkpoints, values = folder / "runs" / run.id, json.dumps(plain(run.to_dict()), indent=1) + "\n"
    path = checkpoints / "run.json"
    if not path.is_file() or path.read_text(encoding="utf-8") != values:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        write_text(path, values)
    return checkpoints


_COUNTED = {"all": lambda p: True, "trained": lambda p: p.requires_grad}


class Batches:
    """The batches of a run from any step on: the same for all methods with the same tasks, budget and seed."""

    def __init__(self, run: Run, study: Study, beginning: Beginning, gist: list[int]) -> None:
        self.run, self.weights, self.beginning = run, study.tasks[run.tasks].weights, beginning
        self.writer = beginning.writer(gist)

    def __call__(self, start: int) -> Iterator[dict[str, Tensor]]:
        budget, seed = self.run.budget, self.run.seed
        for step in range(start, budget.steps):
            rng = np.random.default_rng([seed, 13, step])
            samples = training_batch(
                self.weights, self.beginning.banks["train"], rng, budget.samples, budget.most_turns
            )
            written = [self.writer.write(sample) for sample in samples]
            inputs, _ = self.beginning.inputs(samples, written, "train", budget.row_tokens)
            if budget.dropout:
                drawn = torch.Generator().manual_seed(seed * 1_000_003 + step)
                kept = torch.rand(inputs["image_features"].shape, generator=drawn) >= budget.dropout
                inputs["image_features"] = inputs["image_features"] * kept / (1 - budget.dropout)
            yield inputs


def step_flops(model: Any, batch: dict[str, Tensor], device: str) -> int:
    """Operations of matrix products and attention, forward and backward, of one step; nothing is trained."""
    counter = FlopCounterMode(display=False)
    with counter, computing(model):
        model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()
