"""Losses reach TensorBoard and Weights & Biases; what is not installed is named."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from casa.errors import UserError
from casa.training.callbacks import reporters
from casa.training.config import parse_recipe
from casa.training.run import train


def test_reporters_are_those_asked_for(tmp_path, monkeypatch):
    assert reporters([], tmp_path) == []
    monkeypatch.setattr("casa.training.callbacks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.report_to names wandb, which is not installed: pip install wandb"):
        reporters(["wandb"], tmp_path)


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def wandb(monkeypatch):
    """As much of Weights & Biases as transformers calls; begun: what runs were opened with, sent: what was logged."""
    module, errors = ModuleType("wandb"), ModuleType("wandb.sdk.lib.config_util")
    module.__spec__ = ModuleSpec("wandb", None)
    module.run, module.config, module.begun, module.sent = None, Config(), [], []

    def init(**settings):
        module.begun.append(settings)
        module.run = SimpleNamespace(summary={}, _label=lambda **_: None)

    module.init, module.log = init, module.sent.append
    errors.ConfigError = ValueError
    for one in (module, errors):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


def test_losses_reach_every_reporter(values, tmp_path, wandb):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = parse_recipe(
        values(optimisation={"steps": 2, "decay_steps": 0}, logging={"every": 1, "report_to": ["tensorboard", "wandb"]})
    )
    train(recipe, tmp_path / "run")
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert sorted(losses) == [1, 2]
    assert [settings["name"] for settings in wandb.begun] == ["small"]
    assert {sent["train/global_step"]: sent["train/loss"] for sent in wandb.sent if "train/loss" in sent} == losses
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    drawn = {event.step: event.value for event in board.Scalars("train/loss")}
    assert drawn == pytest.approx(losses, rel=1e-6)  # it keeps float32
    assert {"train/text_tokens_per_second", "train/lr_new", "train/lr_existing"} <= set(board.Tags()["scalars"])
    rates = {event.step: event.value for event in board.Scalars("train/lr_existing")}
    assert rates == pytest.approx({entry["step"]: entry["lr_existing"] for entry in log if "loss" in entry}, rel=1e-6)
    assert rates[2] > 0
