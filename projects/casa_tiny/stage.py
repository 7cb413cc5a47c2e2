"""A stage of the recipe on casa's trainer: batches by their number, a schedule of its own, a folder when it is done.

out/text                  the finished stage: model, and log.json with its losses
out/text-checkpoints      what an unfinished one goes on from
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainerCallback

from casa.errors import UserError
from casa.training.config import (
    DataloaderSettings,
    LoggingSettings,
    OptimisationSettings,
    SavingSettings,
    SpikeSettings,
    TrainerSettings,
)
from casa.training.packed_dataset import DataPosition, PackedBatch
from casa.training.trainer import CasaTrainer
from projects.casa_tiny.recipe import Optimisation, Recipe

SAVE_EVERY, LOG_EVERY = 100, 20  # steps
Batches = Callable[[int], Iterator[dict[str, Tensor]]]
"""Called with the step to begin at, gives what the model is called with, step by step."""


class DrawnBatches(IterableDataset):
    """The batches of a stage as the trainer takes them; the number of a step is the place in the data."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.position = batches, DataPosition()
        self.rank, self.world = 0, 1

    def __iter__(self) -> Iterator[PackedBatch]:
        start = int(self.position.positions.get(0, "0"))
        for step, inputs in enumerate(self.batches(start), start=start + 1):
            yield PackedBatch(inputs, position=str(step))


class StageTrainer(CasaTrainer):
    """The trainer with the schedule that casa-tiny was made with: the first step already learns."""

    def __init__(
        self, model: Any, optimisation: Optimisation, dataset: Any, settings: TrainerSettings, folder: Path, **more: Any
    ):
        self.schedule = optimisation.factor
        super().__init__(model, dataset, settings, folder, **more)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule)
        return self.lr_scheduler


class Told(TrainerCallback):
    """Prints how far a stage is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            print(
                f"{self.name}: step {state.global_step:,} of {state.max_steps:,}, loss {logs['loss']:.4f}", flush=True
            )


def train_stage(
    recipe: Recipe,
    name: str,
    model: Any,
    batches: Batches,
    out: Path,
    save: Callable[[Path], Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Trains the parameters of a model that want gradients, and writes `out/name` when all steps are done.

    Args:
        recipe: Whose stage `name` it is.
        name: text, tower or fusion.
        model: Gives a loss for a batch; it is left in evaluation mode.
        batches: The stage's batches.
        out: The run's folder.
        save: Called with the folder to write the finished model to.
        callbacks: Of transformers' Trainer, beside those that tell how it goes.

    Raises:
        UserError: The run was ended by SIGTERM; called again, it goes on.
    """
    optimisation: Optimisation = getattr(recipe, name).optimisation
    running = out / f"{name}-checkpoints"
    settings = TrainerSettings(
        optimisation=OptimisationSettings(
            steps=optimisation.steps,
            new_lr=optimisation.lr,
            existing_lr=optimisation.lr,
            muon_lr=optimisation.muon_lr,
            weight_decay=optimisation.weight_decay,
            max_grad_norm=optimisation.clip,
            trainable="as given",
        ),
        # a step of few samples is noisy
        spike_detection=SpikeSettings(factor=None),
        saving=SavingSettings(every=SAVE_EVERY),
        logging=LoggingSettings(every=LOG_EVERY),
        dataloader=DataloaderSettings(num_workers=recipe.workers),
        seed=recipe.seed,
        device="cpu",
    )
    # a cache would be filled for nothing, and packed rows must not have one
    model.config.use_cache = False
    trainer = StageTrainer(
        model, optimisation, DrawnBatches(batches), settings, running, callbacks=[Told(name), *callbacks]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)
    if trainer.stopped:
        raise UserError(f"{name} stopped at step {trainer.state.global_step:,}; the same command goes on from there.")
    model.eval()
    part = out / f".{name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save(part)
    (part / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
    part.rename(out / name)
    shutil.rmtree(running, ignore_errors=True)
