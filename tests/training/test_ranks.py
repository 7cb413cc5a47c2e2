"""Two processes under torchrun (gloo), with DDP and with FSDP2, train as one process that does both their work."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from casa import CasaForConditionalGeneration, CasaProcessor
from casa.testing import PATIENCE
from casa.training.checkpoints import saved_checkpoints
from casa.training.fsdp import read_whole, stored_tensors
from casa.training.models import export_checkpoint
from casa.training.packed_dataset import PackedDataset
from casa.training.run import made_of_records, trained_on

STEPS = 4
SCRIPT = Path(__file__).with_name("two_ranks.py")
# float32; the most that was seen is 6e-8
CLOSE = {"rtol": 0.0, "atol": 1e-6}


class BothRanks(PackedDataset):
    """The batches of two processes in turns."""

    def __iter__(self):
        halves = []
        for rank in range(2):
            self.rank, self.world = rank, 2
            halves.append(list(islice(super().__iter__(), STEPS)))
        for pair in zip(*halves, strict=True):
            yield from pair


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """One process's run of the batches of both: the trainer, and its folder."""

    def run(**choice):
        folder = tmp_path_factory.mktemp("alone")
        own = small.stream()
        data = BothRanks(own.open_records, own.maker, own.settings)
        found = small.trainer(folder, own_model=small.model(0.0), data=data, save_every=9, **choice)
        found.train()
        return found, folder

    return run


@pytest.mark.slow
def test_two_processes_are_one(small, alone, tmp_path):
    # one test, so that the processes are started once
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]

    one, folder = alone(steps=STEPS, gradient_accumulation_steps=2, ema_decay=0.9, max_grad_norm=0.5)
    wanted = small.curve(folder)
    assert len(wanted) == STEPS
    for kind in ("ddp", "fsdp"):
        place = tmp_path / kind
        assert [path.name for path in saved_checkpoints(place)] == ["checkpoint-2", "checkpoint-4"]
        lines = (place / "curve.txt").read_text().splitlines()
        # both processes, all steps, and the second half again
        assert len(lines) == 2 * (STEPS + STEPS // 2)
        for step, loss in (line.split() for line in lines):
            assert float(loss) == pytest.approx(wanted[int(step)], rel=0, abs=1e-6)
        check_export(one, place / "checkpoint-4", tmp_path)
        # before clipping, and before AdamW, which forgets a constant factor
        assert norms(place / "checkpoint-4") == pytest.approx(norms(folder / "checkpoint-4"), rel=1e-6)
    counts = [trained_on([one.position]), made_of_records([one.position])]
    assert counts[0]["packs"] == 2 * STEPS
    assert json.loads((tmp_path / "ddp" / "counts.json").read_text()) == counts
    check_resumed(tmp_path / "fsdp")
    whole = CasaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    check_close(dict(whole.named_parameters()), dict(one.model.named_parameters()))
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["architectures"] == [
        "CasaForConditionalGeneration"
    ]

    for_ddp, folder = alone(steps=1, gradient_accumulation_steps=4, max_grad_norm=0.0)
    found = CasaForConditionalGeneration.from_pretrained(tmp_path / "accumulated" / "checkpoint-1")
    check_close(dict(found.named_parameters()), dict(for_ddp.model.named_parameters()))
    assert norms(tmp_path / "accumulated" / "checkpoint-1") == pytest.approx(norms(folder / "checkpoint-1"), rel=1e-6)

    again, _ = alone(steps=1, gradient_accumulation_steps=4, gradient_checkpointing=True)
    out = export_checkpoint(tmp_path / "again" / "checkpoint-1", tmp_path / "again" / "out")
    found = CasaForConditionalGeneration.from_pretrained(out)
    check_close(dict(found.named_parameters()), dict(again.model.named_parameters()))
    assert [path.name for path in saved_checkpoints(tmp_path / "asked")] == ["checkpoint-2"]
    assert not list((tmp_path / "asked").glob(".*"))
    # bf16 has eight bits
    assert small.curve(tmp_path / "half")[1] == pytest.approx(wanted[1], rel=2e-2)
    assert small.curve(tmp_path / "half")[1] != wanted[1]


def norms(checkpoint):
    """The gradient's norm at each step."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["grad_norm"] for entry in log if "grad_norm" in entry]


def check_export(one, checkpoint, tmp_path):
    """Weights and averages of the run of one process come out of a checkpoint."""
    out = tmp_path / f"out-{checkpoint.parent.name}"
    found = CasaForConditionalGeneration.from_pretrained(export_checkpoint(checkpoint, out))
    check_close(dict(found.named_parameters()), dict(one.model.named_parameters()))
    assert not (out / "trainer_state.json").exists()
    assert CasaProcessor.from_pretrained(out).image_token == "<image>"
    averaged = export_checkpoint(checkpoint, out.with_name(out.name + "-ema"), average=True)
    found = CasaForConditionalGeneration.from_pretrained(averaged)
    check_close(dict(found.named_parameters()), one.ema.average)
    assert not torch.equal(one.ema.average["backbone.lm_head.weight"], one.model.backbone.lm_head.weight)


def check_resumed(place):
    """Weights and moments after the second half, done again, are bit for bit those of the run to the end."""
    both = []
    for name in ("checkpoint-4", "away"):
        both.append(read_whole(place / name, stored_tensors(place / name)))
    assert both[0].keys() == both[1].keys()
    assert {key.split("/")[0] for key in both[0]} > {"weights", "exp_avg", "exp_avg_sq", "step", "average"}
    for key, value in both[0].items():
        assert torch.equal(value, both[1][key]), key


def check_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
