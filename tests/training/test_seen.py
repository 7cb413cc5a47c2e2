"""What a run shows: lines on a terminal and in a file, and curves."""

import io
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from casa.training.callbacks import ProgressCallback, figures_line
from casa.training.run import draw_curve

LOG = {
    "loss": 1.23456,
    "text_tokens_per_second": 5300.2,
    "images_per_second": 18.21,
    "packed_text": 0.931,
    "packed_image": 0.984,
    "memory_gib": 17.24,
}


def state(step=5):
    return SimpleNamespace(global_step=step, max_steps=10, is_world_process_zero=True)


def test_figures_are_told_in_units():
    assert figures_line(LOG) == "loss 1.235  5,300 tok/s  18.2 img/s  packed 93 / 98 %  17.2 GiB"
    assert figures_line({"loss": 2.0}) == "loss 2"
    rates = {"lr_new": 1e-4, "lr_muon": 0.02, "lr_existing": 1.5e-5}
    assert figures_line({"loss": 2.0, **rates}) == "loss 2  lr new 0.0001, muon 0.02, existing 1.5e-05"


def test_a_file_gets_lines(capsys):
    held = io.StringIO()
    shown = ProgressCallback(Console(file=held, width=60, soft_wrap=True))
    shown.on_train_begin(None, state(0), None)
    shown.on_step_end(None, state(), None)
    shown.on_log(None, state(), None, logs=dict(LOG))
    shown.on_log(None, state(), None, logs={"eval_loss": 0.5, "eval_pages_digits": 0.75})
    shown.on_log(None, state(), None, logs={"train_runtime": 3.0})
    shown.close()
    first, second = held.getvalue().splitlines()
    assert first.startswith("step 5 of 10: loss 1.235  5,300 tok/s")
    assert first.endswith("min left")
    assert second == "step 5: held-out loss 0.5  pages_digits 0.75"
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_is_taken_down():
    held = io.StringIO()
    shown = ProgressCallback(Console(file=held, width=160, force_terminal=True))
    shown.on_train_begin(None, state(0), None)
    shown.on_step_end(None, state(), None)
    shown.on_log(None, state(), None, logs=dict(LOG))
    shown.on_save(None, state(), None)
    shown.close()
    assert "5 of 10" in held.getvalue()
    assert "loss 1.235" in held.getvalue()
    shown.close()


def test_other_processes_are_silent():
    held = io.StringIO()
    shown = ProgressCallback(Console(file=held))
    other = SimpleNamespace(**{**vars(state()), "is_world_process_zero": False})
    shown.on_train_begin(None, other, None)
    shown.on_log(None, other, None, logs=dict(LOG))
    assert held.getvalue() == ""


@pytest.mark.parametrize("count", [1, 30, 100])
def test_curves(tmp_path, count):
    path = tmp_path / "loss.png"
    history = [{"step": number, "loss": 5 / number} for number in range(1, count + 1)]
    history += [{"step": count, "eval_loss": 1.0}, {"step": count, "train_loss": 2.0}]
    assert draw_curve(history, path, "mine")
    with Image.open(path) as drawn:
        assert drawn.width > 600
    assert not draw_curve([{"step": 1, "train_loss": 2.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
