"""A small run of the trainer, in this process or as a script that can be killed: `small_run.py FOLDER key=value ...`.

Every step appends its number and loss to FOLDER/curve.txt. die=6: the process is killed while it saves step 6.
"""

import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from casa.data import BadRecord, Shard
from casa.data.record import Message, Origin, Picture, Record, Text
from casa.testing import PATIENCE, tiny_casa, tiny_processor
from casa.training.config import (
    DataloaderSettings,
    LoggingSettings,
    OptimisationSettings,
    PackingSettings,
    SavingSettings,
    SpikeSettings,
    TokenBudget,
    TrainerSettings,
)
from casa.training.packed_dataset import PackedDataset
from casa.training.samples import SampleMaker
from casa.training.trainer import CasaTrainer

BUDGET = TokenBudget(60, 30)


def records(count=40):
    """Conversations of uneven lengths, most with pictures."""
    generator = np.random.default_rng(5)
    found = []
    for number in range(count):
        size = [int(side) for side in generator.integers(1, 4, 2)]
        pixels = generator.integers(0, 255, (28 * size[0], 28 * size[1], 3), dtype=np.uint8)
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "PNG")
        asked = [Text("read" * int(generator.integers(1, 4)))]
        if number % 5:
            asked.insert(0, Picture(held.getvalue()))
        said = Text("".join(generator.choice([*"0123456789"], int(generator.integers(1, 9)))))
        found.append(
            Record((Message("user", tuple(asked)), Message("assistant", (said,))), Origin("drawn", number + 1))
        )
    return found


class OpenDrawn:
    """Opens the records for a reader; can be sent to its process."""

    def __init__(self, repeat=True, count=40):
        self.repeat, self.count = repeat, count

    def __call__(self, shard):
        return ListedRecords(records(self.count), shard=shard, repeat=self.repeat)


def stream(repeat=True, buffer=8, count=40):
    maker = SampleMaker(tiny_processor(), BUDGET)
    return PackedDataset(OpenDrawn(repeat, count), maker, PackingSettings(budget=BUDGET, buffer_size=buffer))


class ListedRecords:
    """The records of a list, each reader's share of them, round and round (or once).

    refused: (origin, why) of every record that could not be learned from.
    """

    def __init__(self, records: Sequence[Record], *, shard: Shard | None = None, repeat: bool = True) -> None:
        shard = shard if shard is not None else Shard()
        self._records = records[shard.index :: shard.count]
        self._repeat = repeat
        self._next = 0
        self.refused: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Record]:
        while self._records and (self._repeat or self._next < len(self._records)):
            number = self._next
            self._next += 1
            yield self._records[number % len(self._records)]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]

    def refuse(self, origin: Origin, bad: BadRecord) -> None:
        self.refused.append((str(origin), str(bad)))


class Curve(TrainerCallback):
    """Writes the losses down; `slow` seconds per step, so that a test can kill it in between. hold: the step behind
    which it waits until that is done, however late."""

    def __init__(self, folder, slow=0.0, hold=None):
        self.folder, self.slow, self.hold, self.trainer = folder, slow, hold, None

    def on_step_end(self, args, state, control, **kwargs):
        with (self.folder / "curve.txt").open("a") as file:
            file.write(f"{state.global_step} {self.trainer.last_loss!r}\n")
        time.sleep(self.slow if state.global_step != self.hold else PATIENCE)


def model(dropout=0.1, dtype=torch.float32):
    """With dropout, so that random numbers matter."""
    found = tiny_casa(dtype=dtype)
    found.backbone.config.attention_dropout = dropout
    for block in found.backbone.model.layers:
        block.self_attn.attention_dropout = dropout
    return found


def trainer(
    folder, *, steps=8, slow=0.0, hold=None, num_workers=0, save_every=3, keep=2, data=None, own_model=None, **choice
):
    loading = {name: choice.pop(name) for name in ("feature_cache_gb", "feature_cache_dir") if name in choice}
    spikes, sharding = choice.pop("spike_detection", SpikeSettings()), choice.pop("sharding", "ddp")
    edge = min(2, steps // 4)
    values = {
        "new_lr": 3e-3,
        "existing_lr": 1e-3,
        "warmup_steps": edge,
        "decay_steps": edge,
        "gradient_accumulation_steps": 2,
    }
    settings = TrainerSettings(
        optimisation=OptimisationSettings(steps=steps, **(values | choice)),
        spike_detection=spikes,
        dataloader=DataloaderSettings(num_workers=num_workers, **loading),
        saving=SavingSettings(every=save_every, keep=keep),
        logging=LoggingSettings(every=1),
        device="cpu",
        sharding=sharding,
    )
    curve = Curve(Path(folder), slow, hold)
    found = CasaTrainer(
        own_model or model(), data or stream(), settings, folder, processor=tiny_processor(), callbacks=[curve]
    )
    curve.trainer = found
    return found


def curve(folder):
    """Losses by step; of a step that was done twice, the last."""
    lines = (Path(folder) / "curve.txt").read_text().splitlines()
    return {int(step): float(loss) for step, loss in (line.split() for line in lines)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(pair.split("=") for pair in sys.argv[2:])
    given = {key: float(value) if "." in value else int(value) for key, value in values.items()}
    if "dropout" in given:
        given["own_model"] = model(given.pop("dropout"))
    die = given.pop("die", 0)
    run = trainer(folder, **given)
    if die:
        save = run._save_rng_state

        def killed(place):
            if run.state.global_step == die:
                os.kill(os.getpid(), signal.SIGKILL)
            save(place)

        run._save_rng_state = killed
    run.train(resume_from_checkpoint=True)
