"""Runs that are interrupted go on as if they had not been: losses, data, random numbers, optimiser."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import TrainerCallback

from casa import CasaForConditionalGeneration, CasaProcessor
from casa.errors import UserError
from casa.training.checkpoints import newest_checkpoint, saved_checkpoints, unfinished


class Break(TrainerCallback):
    """Ends a run in the middle of nowhere, as a fault would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=1e-6), step


@pytest.mark.slow
def test_the_curve_of_a_broken_run_is_the_whole_ones(small, whole, tmp_path):
    first = small.trainer(tmp_path)
    first.add_callback(Break(5))
    with pytest.raises(InterruptedError):
        first.train()
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["checkpoint-3"]
    torch.manual_seed(99)
    small.trainer(tmp_path).train(resume_from_checkpoint=True)
    same(small.curve(tmp_path), whole)
    assert len(set(whole.values())) == len(whole)


@pytest.mark.slow
def test_so_is_that_of_one_with_muon(small, whole, tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    small.trainer(tmp_path / "whole", muon_lr=0.02).train()
    first = small.trainer(tmp_path / "broken", muon_lr=0.02)
    first.add_callback(Break(5))
    with pytest.raises(InterruptedError):
        first.train()
    small.trainer(tmp_path / "broken", muon_lr=0.02).train(resume_from_checkpoint=True)
    wanted = small.curve(tmp_path / "whole")
    same(small.curve(tmp_path / "broken"), wanted)
    assert wanted != whole
    saved = torch.load(newest_checkpoint(tmp_path / "broken") / "optimizer.pt", weights_only=True)
    assert any("momentum" in state for state in saved["state"].values())


@pytest.mark.slow
def test_random_numbers_matter_here(small, whole, tmp_path):
    """The test above would see a run that goes on with other random numbers, or other data."""
    first = small.trainer(tmp_path)
    first.add_callback(Break(5))
    with pytest.raises(InterruptedError):
        first.train()
    (tmp_path / "checkpoint-3" / "rng_state.pth").unlink()
    small.trainer(tmp_path).train(resume_from_checkpoint=True)
    assert small.curve(tmp_path)[4] != pytest.approx(whole[4], rel=1e-6)


@pytest.mark.slow
def test_processes_that_read_ahead_change_nothing(small, tmp_path):
    curves = []
    for name, broken in (("whole", False), ("broken", True)):
        folder = tmp_path / name
        folder.mkdir()
        if broken:
            first = small.trainer(folder, num_workers=2, steps=6, save_every=2)
            first.add_callback(Break(5))
            with pytest.raises(InterruptedError):
                first.train()
        small.trainer(folder, num_workers=2, steps=6, save_every=2).train(resume_from_checkpoint=True)
        curves.append(small.curve(folder))
    same(curves[1], curves[0])


def test_another_number_of_readers_is_refused(small, tmp_path):
    small.trainer(tmp_path, steps=1).train()
    with pytest.raises(UserError, match="set num_workers to 1"):
        small.trainer(tmp_path, steps=2, num_workers=2).train(resume_from_checkpoint=True)


def start(script, folder, *values):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(script), str(folder), *values]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(small, folder, process, count):
    while not (folder / "curve.txt").exists() or len(small.curve(folder)) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(small, whole, script, tmp_path):
    killed = start(script, tmp_path, "slow=0.3", "hold=7")
    # past the pause behind a step, so that a checkpoint or another step may be hit
    step, wait = random.randint(1, 6), random.uniform(0, 0.4)
    print(f"killed {wait:.2f} s after step {step}")
    wait_for_steps(small, tmp_path, killed, step)
    time.sleep(wait)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "checkpoint-8").exists()
    small.trainer(tmp_path).train(resume_from_checkpoint=True)
    same(small.curve(tmp_path), whole)


@pytest.mark.slow
def test_killed_while_checkpointing_and_resumed(small, whole, script, tmp_path):
    killed = start(script, tmp_path, "die=6")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert unfinished(tmp_path, "checkpoint-6").exists()
    CasaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-3")
    small.trainer(tmp_path).train(resume_from_checkpoint=True)
    same(small.curve(tmp_path), whole)


class Asked(TrainerCallback):
    """Gets a scheduler's signal in its third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_sigterm_saves_what_was_done(small, whole, tmp_path):
    asked = small.trainer(tmp_path, save_every=100)
    asked.add_callback(Asked())
    asked.train()
    assert (asked.stopped, asked.state.global_step) == (True, 3)
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    small.trainer(tmp_path, save_every=100).train(resume_from_checkpoint=True)
    same(small.curve(tmp_path), whole)


def test_a_checkpoint_is_a_model(small, tmp_path):
    run = small.trainer(tmp_path, steps=2)
    run.train()
    newest = newest_checkpoint(tmp_path)
    loaded = CasaForConditionalGeneration.from_pretrained(newest)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert loaded.config.use_cache
    assert CasaProcessor.from_pretrained(newest).frame_suffix == "<frame>"


def test_data_that_end_end_the_run_with_a_checkpoint(small, tmp_path):
    run = small.trainer(tmp_path, steps=1000, data=small.stream(repeat=False, count=20))
    run.train()
    assert 1 < run.state.global_step < 30
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{run.state.global_step}"


def test_the_newest_few_are_kept(small, tmp_path):
    small.trainer(tmp_path, steps=5, save_every=1, keep=3).train()
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_finished_run_is_finished_and_goes_on_as_its_settings_say_now(small, tmp_path):
    run = small.trainer(tmp_path, steps=2, save_every=2)
    run.train()
    # as if it had been killed before it said what came out
    again = small.trainer(tmp_path, steps=2, save_every=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert len((tmp_path / "curve.txt").read_text().splitlines()) == 2
    for name, parameter in run.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name
    # the checkpoint's state remembers the interval of the run that wrote it
    small.trainer(tmp_path, steps=4, save_every=1, keep=9).train(resume_from_checkpoint=True)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert sorted(small.curve(tmp_path)) == [1, 2, 3, 4]
