"""Training of the page encoder: killed and resumed is the same, bit for bit, and it learns."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from casa.errors import UserError
from projects.casa_smol.encoder import Run, Settings, main, scores, stacked, train
from projects.casa_smol.fonts import CHARACTERS
from projects.casa_smol.targets import page
from projects.casa_smol.weights import export

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "projects.casa_smol.encoder", "--tiny"]
TINY = Settings(
    shapes=((1, 64, 64), (2, 96, 64)), hidden_size=8, stem_sizes=(4, 4), dilations=(1,), keep_every=2, score_pages=2
)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_as_uninterrupted(tmp_path):
    # as many threads as here: sums in another order would differ in their last bits
    threads = str(torch.get_num_threads())
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": threads}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [*COMMAND, str(killed), "--steps", "100000"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    reached = weights(killed)["step"]
    assert 0 < reached < 100_000
    for folder in (killed, whole):
        assert main([str(folder), "--tiny", "--steps", "100000", "--stop", str(reached + 7)]) == 0
    one, two = weights(killed), weights(whole)
    assert one["step"] == two["step"] == reached + 7
    for part in ("learner", "average"):
        for name, value in two[part].items():
            assert torch.equal(one[part][name], value), name


def test_losses_fall_and_are_written_down(tmp_path):
    run = train(tmp_path, replace(TINY, steps=12, bf16=False), workers=0, score=True)
    log = json.loads((tmp_path / "log.json").read_text())
    assert [line["step"] for line in log["log"]] == [2, 4, 6, 8, 10, 12]
    assert log["log"][-1]["classes"] < log["log"][0]["classes"]
    assert set(log["log"][-1]["held_out"]) == {"characters", "folded", "inks", "words"}
    assert run.step == 12


@pytest.mark.slow
def test_a_page_learnt_by_heart_is_read():
    settings = replace(TINY, steps=200, hidden_size=24, rate=1e-2, bf16=False, ema=0.8, score_pages=1)
    run, seed = Run.start(settings), (settings.seed, 987654321, 0)
    batch = stacked([page(seed, (256, 256), "train", 0.0)])
    for _ in range(120):
        run.learn(batch)
    found = scores(run.average, settings, "train", 0.0)
    assert found["characters"] > 0.6
    assert found["folded"] >= found["characters"]


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    train(tmp_path, replace(TINY, steps=2), workers=0, score=False)
    with pytest.raises(UserError, match="other settings"):
        Run.at(tmp_path, replace(TINY, steps=4, seed=9))
    assert Run.at(tmp_path, replace(TINY, steps=40)).step == 2


def test_the_rate_rises_stays_and_falls():
    settings = Settings(steps=1000)
    rates = [settings.rate_at(step) / settings.rate for step in (0, 19, 40, 699, 850, 999)]
    assert rates == pytest.approx([1 / 40, 0.5, 1, 1, 0.5, 0.01], abs=1e-2)


def test_the_encoder_reads_the_characters_of_its_pages():
    assert Settings().encoder().characters == CHARACTERS


def test_a_longer_encoder_begins_as_the_shorter_one(tmp_path):
    short = replace(TINY, dilations=(1, 2), steps=2)
    train(tmp_path, short, workers=0, score=False)
    run = Run.start(replace(short, dilations=(1, 2, 4)))
    run.take(tmp_path)
    picture = torch.from_numpy(page((3, 4), (64, 64))[0])[None]
    shorter = Run.at(tmp_path, short).average.eval()
    assert torch.equal(run.learner.eval()(picture)["classes"], shorter(picture)["classes"])


def test_a_run_begins_with_exported_weights_as_if_batch_norm_had_never_left(tmp_path):
    whole = train(tmp_path / "one", replace(TINY, steps=6, bf16=False), workers=0, score=False)
    export(tmp_path / "one", tmp_path / "weights.safetensors", pages=1)
    deeper = Run.start(replace(TINY, seed=5, dilations=(1, 2), bf16=False))
    deeper.take(tmp_path / "weights.safetensors")
    pictures = stacked([page((1, 2, number), (96, 64)) for number in range(2)])["pictures"]
    with torch.no_grad():
        wanted, found = whole.average.eval()(pictures), deeper.average.eval()(pictures)
    for name in ("cells", "classes", "middles"):
        torch.testing.assert_close(found[name], wanted[name], atol=0.05, rtol=0.05)  # exported in bfloat16
    kept = deeper.learner.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in deeper.average.state_dict().items())
    assert deeper.learner.training
