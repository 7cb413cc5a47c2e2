"""Every run that two processes do, one after the other under one torchrun: `two_ranks.py FOLDER`.

FOLDER/ddp, FOLDER/fsdp      a run to its end, then again from the checkpoint in its middle: curve.txt has both;
                             after every step the model is looked at with its average for its weights;
                             fsdp is resumed once more, when there is nothing left to do;
                             ddp/counts.json has what both processes have trained on
FOLDER/accumulated           DDP with two packs to a step, and no clipping
FOLDER/again                 FSDP2 with blocks that run again in the backward pass, and two packs to a step
FOLDER/half                  FSDP2 in bf16
FOLDER/whole                 what save_model gives of a sharded model
FOLDER/asked                 the second process alone is asked to stop, in its second step
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import small_run
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from casa.training.checkpoints import of_all_ranks
from casa.training.run import made_of_records, trained_on

STEPS = 4
CHOICE = {"steps": STEPS, "gradient_accumulation_steps": 1, "save_every": 2, "ema_decay": 0.9, "max_grad_norm": 0.5}


class Look(TrainerCallback):
    """Runs the average between steps; that must not touch the steps."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.ema is not None:
            with torch.no_grad(), trainer.ema.in_place():
                trainer.model(**trainer.batches[0].inputs, use_cache=False)


class Asked(TrainerCallback):
    """A scheduler's SIGTERM may reach one process before the others."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def asked(folder):
    folder.mkdir(parents=True, exist_ok=True)
    found = small_run.trainer(folder, **(CHOICE | {"save_every": 9, "ema_decay": None}))
    found.add_callback(Asked())
    found.train()
    assert (found.stopped, found.state.global_step) == (True, 2)


def run(folder, resume=False, **choice):
    folder.mkdir(parents=True, exist_ok=True)
    found = small_run.trainer(folder, own_model=small_run.model(0.0), **(CHOICE | choice))
    found.add_callback(Look(found))
    found.train(resume_from_checkpoint=resume)
    return found


def interrupted(folder, **choice):
    """Goes on from the middle, as if the second half had never been."""
    if dist.get_rank() == 0:
        (folder / f"checkpoint-{STEPS}").rename(folder / "away")
    dist.barrier()
    return run(folder, resume=True, **choice)


def count(trainer, path):
    positions = of_all_ranks(trainer.position)
    if dist.get_rank() == 0:
        path.write_text(json.dumps([trained_on(positions), made_of_records(positions)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    place = Path(sys.argv[1])
    run(place / "ddp")
    count(interrupted(place / "ddp"), place / "ddp" / "counts.json")
    run(place / "fsdp", sharding="fsdp")
    last = interrupted(place / "fsdp", sharding="fsdp")
    last.save_model(str(place / "whole"))
    assert run(place / "fsdp", resume=True, sharding="fsdp").state.global_step == STEPS
    run(place / "accumulated", steps=1, ema_decay=None, max_grad_norm=0.0, gradient_accumulation_steps=2)
    once = {"sharding": "fsdp", "steps": 1, "ema_decay": None, "max_grad_norm": 1.0}
    run(place / "again", **once, gradient_checkpointing=True, gradient_accumulation_steps=2)
    run(place / "half", **once, precision="bfloat16")
    asked(place / "asked")
    dist.barrier()
    os._exit(0)  # as `casa train` ends one of several processes
