"""A scheduler's signal does not wait for scores: the checkpoint comes first."""

import json
import os
import signal

import pytest
from transformers import TrainerCallback

from casa.training.callbacks import EvaluationCallback
from casa.training.checkpoints import newest_checkpoint
from casa.training.config import parse_recipe
from casa.training.run import train


def ask(*_):
    """Sends SIGTERM, as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)
    return {"asked": 1.0}


class Asked(TrainerCallback):
    """Gets the signal in the midst of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            ask()


def kept(out):
    """The newest checkpoint's name, and the steps of its log that have scores."""
    newest = newest_checkpoint(out)
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return newest.name, [entry["step"] for entry in log if any(name.startswith("eval_") for name in entry)]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "scored"), [(2, []), (4, [2])])
def test_nothing_is_measured_in_the_step_of_a_signal(values, tmp_path, step, scored):
    """In the midst of a run of four steps, and in its last one."""
    evaluation = {"every": 2, "data": values()["data"], "packs": 1}
    recipe = parse_recipe(values(evaluation=evaluation, saving={"every": 100}))
    assert train(recipe, tmp_path / "run", callbacks=[Asked(step)]) is None
    assert kept(tmp_path / "run") == (f"checkpoint-{step}", scored)
    # the end of the run is measured when it is gone on with
    final = train(recipe, tmp_path / "run", resume=True)
    assert "held-out loss" in (final / "README.md").read_text()


@pytest.mark.slow
def test_a_signal_while_measuring_ends_the_run_at_that_step(values, tmp_path, monkeypatch):
    saving = {"every": 100}
    once = parse_recipe(values(evaluation={"every": 2, "tasks": ["pages"]}, saving=saving))
    assert train(once, tmp_path / "once", evaluate=ask) is None
    assert kept(tmp_path / "once") == ("checkpoint-2", [2])

    monkeypatch.setattr(EvaluationCallback, "_loss", lambda *_: ask()["asked"])
    both = {"every": 2, "data": values()["data"], "packs": 1, "tasks": ["pages"]}
    twice = parse_recipe(values(evaluation=both, saving=saving))
    assert train(twice, tmp_path / "twice", evaluate=lambda *_: pytest.fail("more was measured")) is None
    assert kept(tmp_path / "twice") == ("checkpoint-2", [])
