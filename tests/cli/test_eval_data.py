"""`casa eval --data`: a real process, killed and gone on with, and what its options say."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

import casa as package
from casa.errors import UserError
from casa.evaluation import page
from casa.media import VideoWriter
from casa.testing import PATIENCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pages with three questions each, and a picture that is cut off."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(12):
        drawn = page(np.random.default_rng(number), "held_out", turns=3, max_side=168)
        drawn.image.save(folder / f"{number}.png")
        rows += [
            {"image": f"{number}.png", "question": turn.question, "answers": [turn.answer]} for turn in drawn.turns
        ]
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    rows.insert(5, {"image": "cut.png", "question": "Read line 1.", "answer": "1"})
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


@pytest.mark.slow
def test_a_picture_that_was_missing_is_asked_about_once_it_is_there(folder, tmp_path, casa):
    """Where no record could be asked it says so, and fails."""
    (tmp_path / "qa.jsonl").write_text('{"image": "later.png", "question": "Read line 1.", "answer": "1"}\n')
    words = ["--data", tmp_path / "qa.jsonl", "--metric", "exact", "--records", tmp_path / "out.jsonl", "--json"]
    lacking = casa("eval", "casa-tiny", *words)
    assert (lacking.status, json.loads(lacking.out)["data"]["n"]) == (2, 0)
    assert "later.png: check the path" in lacking.err
    assert "No question was asked of data: the data has none, or see what is said above." in lacking.err
    (tmp_path / "later.png").write_bytes((folder / "0.png").read_bytes())
    there = casa("eval", "casa-tiny", *words, "--resume")
    assert (there.status, json.loads(there.out)["data"]["n"]) == (0, 1)
    (line,) = lines(tmp_path / "out.jsonl")
    assert "answer" in line


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_file(folder, tmp_path, casa):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = ["--data", folder / "qa.jsonl", "--metric", "anls,exact", "--batch-size", 1, "--device", "cpu", "--json"]
    first = casa("eval", "casa-tiny", *words, "--records", whole)
    assert first.status == 0
    assert "qa.jsonl:6: " in first.err
    assert "cut.png is damaged or cut off" in first.err
    command = [sys.executable, "-m", "casa", "eval", "casa-tiny", *map(str, words), "--records", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + PATIENCE
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 4):
            assert time.monotonic() <= end
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 4 <= path.read_bytes().count(b"\n") < 37
    refused = casa("eval", "casa-tiny", *words, "--records", path)
    assert (refused.status, "go on with it by --resume" in refused.err) == (2, True)
    again = casa("eval", "casa-tiny", *words, "--records", path, "--resume")
    assert again.status == 0
    assert lines(path) == lines(whole)
    assert json.loads(again.out) == json.loads(first.out)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "out.jsonl", "out.jsonl.run.json", "whole.jsonl", "whole.jsonl.run.json",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_cluster_comes_to_the_same_file(folder, tmp_path, monkeypatch, casa):
    """A real one on this machine, stopped in the midst; and what is wrong is said by one sentence of a worker."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    model, whole, path = "casa-tiny", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = ["--data", folder / "qa.jsonl", "--metric", "anls,exact", "--batch-size", 4, "--device", "cpu", "--json"]
    first = casa("eval", model, *words, "--records", whole)
    how = {"data": {"path": str(folder / "qa.jsonl")}, "metrics": ["anls", "exact"], "batch_size": 4, "records": path}

    def stop(task, done, total):
        if done >= 9:
            raise KeyboardInterrupt

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        with pytest.raises(KeyboardInterrupt):
            package.evaluate(model, cluster="auto", progress=stop, **how)
        known = path.read_text().splitlines()
        assert 9 <= len(known) < 37
        again = casa("eval", model, *words, "--records", path, "--resume", "--cluster", "auto")
        # Ray may still tell of the workers that were stopped
        own = [line for line in again.out.splitlines() if "(raylet)" not in line]
        assert (again.status, own) == (0, first.out.splitlines())
        assert lines(path) == lines(whole)
        assert set(known) <= set(path.read_text().splitlines()), "what is answered is not asked again"
        no_model = partial(package.load, str(tmp_path / "none"))
        wrong = package.load(model, device="cpu").evaluator(cluster="auto", load=no_model)
        with pytest.raises(UserError, match="none"):
            wrong.on_data(str(folder / "qa.jsonl"), ["exact"])
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_the_library_and_the_program_give_the_same(folder, tmp_path, casa):
    eyes = package.load("casa-tiny", device="cpu")
    how = {"metrics": ["exact", "anls"], "limit": 9, "suffix": "Please.", "max_new_tokens": 8}
    scores = package.evaluate(eyes, data={"path": str(folder / "qa.jsonl")}, **how)
    told = casa("eval", "casa-tiny", "--data", folder / "qa.jsonl", "--metric", "exact,anls", "--limit", 9,
                "--suffix", "Please.", "--max-new-tokens", 8, "--json", "--out", tmp_path / "eval.json")  # fmt: skip
    assert json.loads(told.out) == scores
    record = json.loads((tmp_path / "eval.json").read_text())
    assert (record["scores"], record["limit"]) == (scores, 9)
    assert record["bad"] == {"data": {"unreadable-picture": 1}}
    assert (scores["data"]["n"], scores["data"]["bad"]) == (8, 1)
    table = casa("eval", "casa-tiny", "--data", folder / "qa.jsonl", "--metric", "exact", "--limit", 9)
    assert "8 questions" in table.out
    assert "95 % interval" in table.out


def test_films_chats_and_several_pictures_are_answered(tmp_path, checkpoint, casa):
    with VideoWriter(tmp_path / "clip.mp4", (56, 56), fps=4) as film:
        for level in range(12):
            film.write(np.full((56, 56, 3), 20 * level, dtype=np.uint8))
    for number in range(2):
        Image.new("RGB", (84, 56), (90 * number, 120, 60)).save(tmp_path / f"{number}.png")
    turns = [("human", "<video>\nwhat?"), ("gpt", "a cat"), ("human", "and?"), ("gpt", "a dog")]
    rows = [
        {"video": "clip.mp4", "conversations": [{"from": side, "value": text} for side, text in turns]},
        {"images": ["0.png", "1.png"], "question": "which?", "answers": ["both", "the two"]},
        {"question": "how are you?", "answer": "well"},
        {"image": "0.png", "caption": "a page"},
        {"video": "clip.mp4", "title": "look", "words": [[0.1, 0.3, "light"], [1.2, 1.4, "comes"]]},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", tmp_path / "mine.jsonl", "--metric", "cer,live", "--fps", 1, "--max-new-tokens", 4]
    result = casa("eval", checkpoint, *words, "--records", tmp_path / "out.jsonl", "--json")
    assert (result.status, result.err) == (0, "")
    found = lines(tmp_path / "out.jsonl")
    assert [(line["question"], line["references"]) for line in found] == [
        ("what?", ["a cat"]),
        ("and?", ["a dog"]),
        ("which?", ["both", "the two"]),
        ("how are you?", ["well"]),
        ("Describe the picture.", ["a page"]),
        ("look", ["light comes"]),
    ]
    assert all("answer" in line and "cer" in line["scores"] for line in found)
    assert set(found[-1]["scores"]) == {"cer", "live_wer", "live_lag", "live_repetition"}
    assert json.loads(result.out)["data"]["n"] == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "qa.jsonl"], "No metric was named; choose from anls"),
        (["--data", "qa.jsonl", "--metric", "anl"], "did you mean 'anls'"),
        (["--data", "gone.jsonl", "--metric", "anls"], "There is no gone.jsonl"),
        (["--data", "qa.jsonl", "--metric", "anls", "--limit", "0"], "The limit is 0; it must be 1 or more"),
        (["--data", "qa.jsonl", "--metric", "anls", "--judge", "http://127.0.0.1:9/v1"], "--judge-model go together"),
        (["--tasks", "pages", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "x"], "leave --judge out"),
        (["--metric", "anls"], "--metric is for --data"),
        (["--records", "x.jsonl"], "--records is for --data or benchmarks"),
        (["--data", "qa.jsonl", "--tasks", "pages"], "leave them or --data out"),
        (["--tasks", "chartqa", "--metric", "anls"], "--metric is for --data of your own"),
        (["--tasks", "chartqa,pages,docvq"], "did you mean 'docvqa'"),
        (["--tasks", "chartqa", "--data", "gone"], "There is no gone"),
        (["--data", "qa.jsonl", "--metric", "anls", "--resume"], "--resume goes on with the file of --records"),
        (["--data", "qa.jsonl", "--metric", "anls", "--template-arg", "x"], "--template-arg 'x' names nothing"),
        (["--data", "qa.jsonl", "--metric", "anls", "--template-arg", "x=1"], "the chat template knows no 'x'"),
        (["--data", "qa.jsonl", "--metric", "anls", "--top-p", "0"], "--top-p is 0.0"),
        (["--tasks", "page"], "did you mean 'pages'"),
        (["--cluster", "local"], "--cluster is for --data or benchmarks"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, monkeypatch, casa, words, said):
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "Read line 1.", "answer": "1"}) + "\n")
    monkeypatch.chdir(tmp_path)
    result = casa("eval", "casa-tiny", *words)
    assert (result.status, said in result.err, result.err.count("\n")) == (2, True, 1), result.err
