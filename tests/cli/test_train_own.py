"""`casa train` on data of one's own: trained, resumed, asked, dry-run; errors in one sentence."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from casa import CasaForConditionalGeneration


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """Records, and a recipe that names them."""
    path = Path(__file__).parents[1] / "training" / "own" / "standins.py"
    spec = importlib.util.spec_from_file_location("standins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("own")
    pages = module.pages(folder / "data", 12, bad=1)
    recipe = {
        "name": "mine",
        "model": {"checkpoint": str(checkpoint)},
        "data": {"sources": [{"path": str(pages)}]},
        "packing": {"budget": {"text": 160, "image": 40}, "buffer": 8},
        "optimisation": {"steps": 2},
        "saving": {"every": 1},
        "logging": {"every": 1},
        "device": "cpu",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_trained_resumed_and_asked(casa, folder, tmp_path):
    recipe, out = folder / "mine.yaml", tmp_path / "run"
    result = casa("train", recipe, "--out", out, "--set", "optimisation.new_rate=1e-3")
    assert (result.status, result.out) == (0, f"{out / 'final'}\n")
    assert "step 2 of 2: loss" in result.err
    # nothing of transformers' own
    assert "it/s" not in result.err
    assert "{'loss'" not in result.out
    assert list((out / "tensorboard").glob("events*"))
    refused = casa("train", recipe, "--out", out, "--set", "optimisation.new_rate=1e-3")
    assert (refused.status, "--resume" in refused.err) == (2, True)
    more = casa(
        "train",
        recipe,
        "--out",
        out,
        "--set",
        "optimisation.new_rate=1e-3",
        "--set",
        "optimisation.steps=3",
        "--resume",
    )
    assert more.status == 0, more.err
    assert "going on from checkpoint-2" in more.err
    steps = [entry["step"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]
    assert steps == [1, 2, 3]
    answer = casa("ask", out / "final", folder / "data" / "3.png", "which is it?", "--max-new-tokens", 3)
    assert (answer.status, answer.err) == (0, "")


def test_offline_tasks_are_scored_while_it_trains(casa, folder, tmp_path):
    tasks = ("--set", "evaluation.every=2", "--set", "evaluation.tasks=[pages, scenes]", "--set", "evaluation.limit=1")
    result = casa("train", folder / "mine.yaml", "--out", tmp_path / "run", *tasks)
    assert result.status == 0, result.err
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    (scores,) = (entry for entry in log if "eval_pages_digits" in entry)
    assert scores["step"] == 2
    assert {name for name in scores if name.startswith("eval_")} == {
        "eval_pages_digits",
        "eval_pages_lines",
        "eval_scenes_accuracy",
    }
    assert "pages_digits" in (tmp_path / "run" / "final" / "README.md").read_text()
    unknown = casa("train", folder / "mine.yaml", "--out", tmp_path / "b", "--set", "evaluation.tasks=[page]")
    assert unknown.status == 2
    assert "pages" in unknown.err


def test_under_torchrun(folder, tmp_path):
    """With FSDP2, whose last step is an export; DDP differs in less, and has a test of its own among the trainer's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = Path(sys.executable).with_name("casa")
    out = tmp_path / "run"
    arguments = ["train", folder / "mine.yaml", "--out", out, "--set", "sharding=fsdp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, program, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # one process speaks
    assert done.stdout == f"{out / 'final'}\n"
    steps = [entry["step"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]
    assert steps == [1, 2]
    CasaForConditionalGeneration.from_pretrained(out / "final")


def test_a_dry_run_trains_nothing(casa, folder, tmp_path):
    picture = tmp_path / "batch.png"
    result = casa("train", folder / "mine.yaml", "--dry-run", "--picture", picture, "--out", tmp_path / "run")
    assert (result.status, result.err) == (0, "")
    for word in ("Sources", "Parameters", "Memory", "The first pack has"):
        assert word in result.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def test_casa_tinys_stages_are_planned(casa):
    result = casa("train", Path(__file__).parents[2] / "recipes" / "casa-tiny.yaml", "--dry-run")
    assert (result.status, len(result.out.splitlines())) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "optimisation.stepz=3"), "did you mean 'steps'?"),
        (("--set", "data.sources.0.path=none.jsonl", "--dry-run"), "There is no none.jsonl"),
        (("--strict",), "pages.jsonl:1: "),
        (("--picture", "x.png"), "--picture is for --dry-run"),
        (("--dry-run", "--picture", "none/x.png"), "does not exist"),
        (("--set", "model.checkpoint=./none"), "there is no model at './none'"),
    ],
)
def test_what_a_user_can_get_wrong(casa, folder, tmp_path, arguments, sentence):
    arguments = [*arguments, "--set", "data.shuffle=0"] if "--strict" in arguments else arguments
    result = casa("train", folder / "mine.yaml", "--out", tmp_path / "run", *arguments)
    assert (result.status, result.out) == (2, "")
    assert sentence in result.err
    assert "Traceback" not in result.err
