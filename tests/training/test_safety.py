"""What must not cost a run: a kill while a checkpoint is written, a full disk, a loss that is no number or jumps."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from casa.errors import UserError
from casa.training import checkpoints
from casa.training.callbacks import SpikeDetector
from casa.training.checkpoints import newest_checkpoint, saved_checkpoints
from casa.training.config import LoraSettings, SpikeSettings
from casa.training.models import with_lora


def names(folder):
    return [path.name for path in saved_checkpoints(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"])
def test_killed_while_a_checkpoint_is_written(small, whole, tmp_path, monkeypatch, where):
    run = small.trainer(tmp_path)

    def killed(*args, **kwargs):
        if run.state.global_step == 6:
            raise KeyboardInterrupt
        return before(*args, **kwargs)

    before = getattr(run, where)
    monkeypatch.setattr(run, where, killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert names(tmp_path) == ["checkpoint-3"]
    assert checkpoints.unfinished(tmp_path, "checkpoint-6").exists()
    small.trainer(tmp_path).train(resume_from_checkpoint=True)
    assert small.curve(tmp_path)[8] == pytest.approx(whole[8], rel=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_killed_before_the_name_is_whole(small, tmp_path, monkeypatch):
    run = small.trainer(tmp_path)
    rename = os.rename

    def killed(source, target):
        if str(target).endswith("checkpoint-6"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.slow
def test_data_that_end_on_a_saved_step_leave_its_checkpoint_alone(small, tmp_path, monkeypatch):
    """It is the only one: were it written anew, there would be a moment without any."""
    rename, named = os.rename, []

    def killed(source, target):
        if (name := os.path.basename(target)) in named:
            raise KeyboardInterrupt
        named.append(name)
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    for resumed in (False, True):
        run = small.trainer(tmp_path, steps=1000, save_every=1, keep=1, data=small.stream(repeat=False, count=20))
        run.train(resume_from_checkpoint=resumed)
        assert names(tmp_path) == [f"checkpoint-{run.state.global_step}"]
    assert run.state.global_step > 1


def test_a_full_disk_is_told_before_anything_is_written(small, tmp_path, monkeypatch):
    run = small.trainer(tmp_path, keep=1)
    free = iter([10**12, 10**6])
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: next(free))
    with pytest.raises(UserError, match=r"step 6 needs 1\d MiB, and .* has 1 MiB free.*checkpoint-3 is kept"):
        run.train()
    assert names(tmp_path) == ["checkpoint-3"]
    assert not checkpoints.unfinished(tmp_path, "checkpoint-6").exists()


def test_under_lora_the_frozen_weights_need_no_room(small, tmp_path, monkeypatch):
    model = with_lora(small.model(), LoraSettings(rank=2, target_modules=("q_proj", "v_proj")))
    run = small.trainer(tmp_path, steps=1, own_model=model, trainable="as given")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    written = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    # with two moments each, and a count of steps
    needed = 3 * written + 4 * len(trained)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: checkpoints._BESIDE + needed)
    run.train()
    assert names(tmp_path) == ["checkpoint-1"]
    names_and_shapes = 300 * len(trained)
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").stat().st_size < written + names_and_shapes
    # one byte less would have been too little
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: checkpoints._BESIDE + needed - 1)
    with pytest.raises(UserError, match="checkpoint of step 1 needs"):
        small.trainer(tmp_path / "less", steps=1, own_model=model, trainable="as given").train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["os", "torch"])
def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint_before(small, tmp_path, monkeypatch, kind):
    run = small.trainer(tmp_path, keep=1)
    before = run._save_rng_state

    def full(place):
        if run.state.global_step == 6:
            if kind == "os":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")
        before(place)

    monkeypatch.setattr(run, "_save_rng_state", full)
    with pytest.raises(UserError, match=r"full before checkpoint-6 was whole.*checkpoint-3 is kept"):
        run.train()
    assert names(tmp_path) == ["checkpoint-3"]
    assert not checkpoints.unfinished(tmp_path, "checkpoint-6").exists()


def test_other_faults_while_writing_are_not_called_a_full_disk(small, tmp_path, monkeypatch):
    run = small.trainer(tmp_path)
    monkeypatch.setattr(run, "_save_rng_state", lambda place: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()


def spoil(run, step, change):
    """Changes the model's loss at one step."""
    model, before = run.model, run.model.forward

    def forward(*args, **kwargs):
        found = before(*args, **kwargs)
        if run.state.global_step + 1 == step:
            found["loss"] = change(found["loss"])
        return found

    model.forward = forward


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_weights_change(small, tmp_path, value):
    run = small.trainer(tmp_path)
    spoil(run, 5, lambda loss: loss * value)
    weights = {}

    def keep(optimiser, args, kwargs):
        weights.update({name: p.detach().clone() for name, p in run.model.named_parameters()})

    run.create_optimizer().register_step_post_hook(keep)
    with pytest.raises(UserError, match=r"At step 5 the loss is (nan|inf).*inspect-5.*resume from checkpoint-3"):
        run.train()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, weights[name])
    saved = load_file(tmp_path / "inspect-5" / "batch-0-1.safetensors")
    assert {"input_ids", "labels", "pixel_values"} <= saved.keys()
    facts = json.loads((tmp_path / "inspect-5" / "facts-0.json").read_text())
    assert len(facts["batches"]) == 2
    assert facts["batches"][0]["records"][0].startswith("drawn:")


@pytest.mark.slow
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_no_number_stops_too(small, tmp_path, clip):
    run = small.trainer(tmp_path, max_grad_norm=clip)
    parameter = run.model.projector.get_parameter(next(name for name, _ in run.model.projector.named_parameters()))
    parameter.register_hook(lambda gradient: gradient * float("nan") if run.state.global_step == 2 else gradient)
    with pytest.raises(UserError, match=r"At step 3 the gradient is no number.*start again"):
        run.train()


def test_a_spike_stops(small, tmp_path):
    run = small.trainer(tmp_path, spike_detection=SpikeSettings(factor=3.0, window=4))
    spoil(run, 6, lambda loss: loss * 20)
    with pytest.raises(UserError, match=r"At step 6 the loss jumped to \d+.*, from about 4"):
        run.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"


def test_what_is_a_spike():
    watch = SpikeDetector(SpikeSettings(factor=3.0, min_increase=1.0, window=4))
    assert [watch.fault(loss) for loss in (9.0, 50.0)] == [None, None]
    watch = SpikeDetector(SpikeSettings(factor=3.0, min_increase=1.0, window=4))
    for loss in (0.1, 0.1, 0.1, 0.9):
        assert watch.fault(loss) is None
    assert "jumped to 1.2" in str(watch.fault(1.2))
    assert list(watch.recent) == [0.1, 0.1, 0.1, 0.9]
    assert SpikeDetector(SpikeSettings(factor=None)).fault(1e9) is None
