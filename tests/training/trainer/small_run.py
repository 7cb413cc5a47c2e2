"""A small run of the trainer, in this process or as a script that can be killed: `small_run.py FOLDER key=value ...`.

Every step appends its number and loss to FOLDER/curve.txt. die=6: the process is killed while it saves step 6.
"""

import io
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from casa.data.record import Message, Origin, Picture, Record, Text
from casa.testing import PATIENCE, tiny_casa, tiny_processor
from casa.training.packs import ListedRecords, PackingSettings, PackStream
from casa.training.samples import Budget, SampleMaker
from casa.training.trainer import CasaTrainer, OptimisationSettings, TrainerSettings, WatchSettings

BUDGET = Budget(60, 30)


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
        return ListedRecords(records(self.count), shard, repeat=self.repeat)


def stream(repeat=True, buffer=8, count=40):
    maker = SampleMaker(tiny_processor(), BUDGET)
    return PackStream(OpenDrawn(repeat, count), maker, PackingSettings(budget=BUDGET, buffer=buffer))


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


def trainer(folder, *, steps=8, slow=0.0, hold=None, workers=0, save_every=3, data=None, own_model=None, **choice):
    watch = choice.pop("watch", WatchSettings())
    keep = choice.pop("keep", 2)
    sharding = choice.pop("sharding", "ddp")
    kept = {name: choice.pop(name) for name in ("keep_gigabytes", "keep_folder") if name in choice}
    edge = min(2, steps // 4)
    values = {"new_rate": 3e-3, "existing_rate": 1e-3, "warmup": edge, "decay": edge, "accumulate": 2} | choice
    settings = TrainerSettings(
        folder=str(folder),
        optimisation=OptimisationSettings(steps=steps, **values),
        watch=watch,
        save_every=save_every,
        keep=keep,
        log_every=1,
        workers=workers,
        device="cpu",
        sharding=sharding,
        **kept,
    )
    curve = Curve(Path(folder), slow, hold)
    found = CasaTrainer(own_model or model(), data or stream(), settings, processor=tiny_processor(), callbacks=[curve])
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
