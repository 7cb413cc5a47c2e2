"""`casa train` on data of one's own: trained, resumed, asked, dry-run; errors in one sentence."""

import atexit
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import casa as package
from casa import CasaForConditionalGeneration
from casa.testing import PATIENCE
from casa.training.checkpoints import newest_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """Records, and a recipe that names them."""
    path = Path(__file__).parents[1] / "training" / "standins.py"
    spec = importlib.util.spec_from_file_location("standins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("own")
    pages = module.pages(folder / "data", 12, bad=1)
    recipe = {
        "name": "mine",
        "model": {"checkpoint": str(checkpoint)},
        "data": {"sources": [{"path": str(pages)}]},
        "packing": {"budget": {"text": 160, "image": 40}, "buffer_size": 8},
        "optimisation": {"steps": 2},
        "saving": {"every": 1},
        "logging": {"every": 1},
        "device": "cpu",
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.slow
def test_trained_resumed_and_asked(casa, folder, tmp_path):
    recipe, out = folder / "mine.yaml", tmp_path / "run"
    result = casa("train", recipe, "--out", out, "--set", "optimisation.new_lr=1e-3")
    assert (result.status, result.out) == (0, f"{out / 'final'}\n")
    assert "step 2 of 2: loss" in result.err
    # nothing of transformers' own
    assert "it/s" not in result.err
    assert "{'loss'" not in result.out
    assert list((out / "tensorboard").glob("events*"))
    refused = casa("train", recipe, "--out", out, "--set", "optimisation.new_lr=1e-3")
    assert (refused.status, "--resume" in refused.err) == (2, True)
    more = casa(
        "train",
        recipe,
        "--out",
        out,
        "--set",
        "optimisation.new_lr=1e-3",
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_answers_to_held_out_questions_are_scored_while_it_trains(casa, folder, tmp_path):
    changes = {
        "every": 2,
        "data": f"{{sources: [{{path: {folder / 'data' / 'pages.jsonl'}}}]}}",
        "metrics": "[exact, cer]",
        "suffix": "in short",
        "max_new_tokens": 3,
        "limit": 4,
    }
    words = [word for name, value in changes.items() for word in ("--set", f"evaluation.{name}={value}")]
    result = casa("train", folder / "mine.yaml", "--out", tmp_path / "run", *words)
    assert result.status == 0, result.err
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    (scores,) = (entry for entry in log if "eval_cer" in entry)
    eyes = package.load(tmp_path / "run" / "final", device="cpu")
    how = {"metrics": ["exact", "cer"], "suffix": "in short", "max_new_tokens": 3, "limit": 4}
    alone = package.evaluate(eyes, data=folder / "data" / "pages.jsonl", **how)["data"]
    assert (scores["eval_exact"], scores["eval_cer"]) == (alone["exact"], alone["cer"])
    assert "cer" in (tmp_path / "run" / "final" / "README.md").read_text()
    unknown = casa("train", folder / "mine.yaml", "--out", tmp_path / "b", *words, "--set", "evaluation.metrics=[exat]")
    assert (unknown.status, "did you mean 'exact'" in unknown.err) == (2, True)


# which calls torchrun, by which tests of the trainer start DDP and FSDP2; two processes by gloo: the recipe says cpu
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--no_python"),
]


@pytest.mark.slow
def test_two_processes(folder, tmp_path):
    program, out = Path(sys.executable).with_name("casa"), tmp_path / "run"
    command = [sys.executable, *ACCELERATE, program, "train", folder / "mine.yaml", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--set", "sharding=fsdp"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # one process speaks
    assert done.stdout == f"{out / 'final'}\n"
    steps = [entry["step"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]
    assert steps == [1, 2]
    CasaForConditionalGeneration.from_pretrained(out / "final")


def test_a_process_of_several_ends_without_the_interpreter(casa, folder, tmp_path, monkeypatch):
    """While that ends, a thread of gloo that lets go of a tensor would abort the process."""
    ended = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(package, "train", lambda *given, **named: tmp_path / "final")
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: ended.append("handlers"))
    monkeypatch.setattr(os, "_exit", ended.append)
    result = casa("train", folder / "mine.yaml")
    assert (ended, result.out, result.err) == (["handlers", 0], f"{tmp_path / 'final'}\n", "")


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(folder, tmp_path):
    program, out = Path(sys.executable).with_name("casa"), tmp_path / "run"
    command = [program, "train", folder / "mine.yaml", "--out", out, "--set", "optimisation.steps=2000"]
    running = subprocess.Popen(
        [*command, "--set", "saving.every=2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "step 2 of" not in (line := running.stderr.readline()):
        assert line, "it ended before its second step"
    running.send_signal(signal.SIGTERM)
    said, errors = running.communicate(timeout=PATIENCE)
    assert (running.returncode, said) == (0, ""), errors
    assert "resume the run to go on from there" in errors
    assert newest_checkpoint(out) is not None


@pytest.mark.slow
def test_bad_data_of_every_kind_never_stops_a_run(casa, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    good = (data / "pages.jsonl").read_text().splitlines()[1:]
    (data / "cut.jpg").write_bytes(jpeg()[:400])
    (data / "a.jpg").write_bytes(jpeg())

    def row(said, images, answer="red"):
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": images}

    bad = [
        (row("<image>what", ["gone.jpg"]), "missing-picture"),
        (row("<image>what", ["cut.jpg"]), "unreadable-picture"),
        (row("what", ["a.jpg"]), "picture-without-tag"),
        (row("<image><image>what", ["a.jpg"]), "tag-without-picture"),
        (row("<image>what", ["a.jpg"], ""), "empty-answer"),
        (7, "wrong-type"),
        ({"messages": 3}, "wrong-type"),
        (row("what", [], "x" * 20_000_000), "over-budget"),
    ]
    right = row("<image>\U0001f680 \u05e9\u05dc\u05d5\u05dd", ["a.jpg"])
    lines = [json.dumps(value) for value, _ in bad] + [json.dumps(right, ensure_ascii=False), *good]
    (data / "mixed.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = ("--set", f"data.sources.0.path={data / 'mixed.jsonl'}", "--set", "data.shuffle=0")
    once = (*source, "--set", "data.exhausted=leave", "--set", "optimisation.steps=200")
    result = casa("train", folder / "mine.yaml", "--out", tmp_path / "run", *once)
    assert result.status == 0, result.err
    found = [json.loads(line) for line in (tmp_path / "run" / "bad-records.jsonl").read_text().splitlines()]
    named = {int(entry["origin"].rpartition(":")[2]): entry["reason"] for entry in found}
    assert named == {number: reason for number, (_, reason) in enumerate(bad, start=1)}
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    strict = casa("train", folder / "mine.yaml", "--out", tmp_path / "strict", *once, "--strict")
    assert (strict.status, "mixed.jsonl:1: " in strict.err) == (2, True)


def jpeg():
    held = io.BytesIO()
    Image.effect_noise((84, 56), 60).convert("RGB").save(held, "JPEG")
    return held.getvalue()


def test_a_dry_run_trains_nothing(casa, folder, tmp_path):
    page = tmp_path / "batch.html"
    result = casa("train", folder / "mine.yaml", "--dry-run", "--report", page, "--out", tmp_path / "run")
    assert (result.status, result.err) == (0, "")
    for word in ("Sources", "Parameters", "Memory", "The first pack has"):
        assert word in result.out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_template_whose_answers_cannot_be_learned_as_they_stand_is_told_of(casa, folder, checkpoint, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(checkpoint, odd)
    template = odd / "chat_template.jinja"
    text = template.read_text().replace("<end>", " ").replace("<assistant>{% endif", "<assistant>hm {% endif")
    template.write_text(text)
    for more in (("--dry-run", "--report", tmp_path / "batch.html"), ("--set", "optimisation.steps=1")):
        run = ("--out", tmp_path / "run", "--set", f"model.checkpoint={odd}")
        result = casa("train", folder / "mine.yaml", *run, *more)
        assert result.status == 0
        assert "the chat template's generation prompt ends with 'hm ', which a finished chat has not" in result.err
        assert "only the last answer of a chat learns to stop" in result.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "optimisation.stepz=3"), "did you mean 'steps'?"),
        (("--set", "data.sources.0.path=none.jsonl", "--dry-run"), "There is no none.jsonl"),
        (("--strict",), "pages.jsonl:1: "),
        (("--report", "x.html"), "--report is for --dry-run"),
        (("--dry-run", "--report", "none/x.html"), "does not exist"),
        (("--set", "model.checkpoint=./none"), "there is no model at './none'"),
    ],
)
def test_what_a_user_can_get_wrong(casa, folder, tmp_path, arguments, sentence):
    arguments = [*arguments, "--set", "data.shuffle=0"] if "--strict" in arguments else arguments
    result = casa("train", folder / "mine.yaml", "--out", tmp_path / "run", *arguments)
    assert (result.status, result.out) == (2, "")
    assert sentence in result.err
    assert "Traceback" not in result.err
