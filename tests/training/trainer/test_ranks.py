"""Two processes under torchrun (gloo, DDP) train as one process that does both their work."""

import os
import subprocess
import sys

import pytest
import torch

from casa import CasaForConditionalGeneration
from casa.training.packs import PackStream
from casa.training.trainer import saved_checkpoints

STEPS = 4


class BothRanks(PackStream):
    """The batches of two processes in turns."""

    def __iter__(self):
        halves = []
        for rank in range(2):
            self.rank, self.world = rank, 2
            halves.append(super().__iter__())
            halves[-1] = [next(halves[-1]) for _ in range(STEPS)]
        for pair in zip(*halves, strict=True):
            yield from pair


def torchrun(script, folder, *values):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), *values], env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def two_ranks(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(script, folder, f"steps={STEPS}", "accumulate=1", "dropout=0.0", "save_every=2")
    return folder


def test_two_processes_are_one(small, two_ranks, tmp_path):
    alone = small.stream()
    both = BothRanks(alone.open_records, alone.maker, alone.settings)
    run = small.trainer(tmp_path, steps=STEPS, own_model=small.model(0.0), data=both, accumulate=2, save_every=2)
    run.train()
    assert [path.name for path in saved_checkpoints(two_ranks)] == ["checkpoint-2", "checkpoint-4"]
    found = CasaForConditionalGeneration.from_pretrained(two_ranks / "checkpoint-4")
    began = small.model(0.0)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert not torch.equal(began.backbone.lm_head.weight, found.backbone.lm_head.weight)
    for step, loss in small.curve(tmp_path).items():
        assert small.curve(two_ranks)[step] == pytest.approx(loss, rel=1e-6)


def test_two_processes_resume(small, script, two_ranks):
    wanted = small.curve(two_ranks)
    saved_checkpoints(two_ranks)[-1].rename(two_ranks / "away")
    torchrun(script, two_ranks, f"steps={STEPS}", "accumulate=1", "dropout=0.0", "save_every=2")
    for step, loss in small.curve(two_ranks).items():
        assert loss == pytest.approx(wanted[step], rel=1e-6)
