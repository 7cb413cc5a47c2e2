"""docs/evaluation.md: its commands and programs run, in one folder with its questions in it; its tables are whole."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import casa
from casa.cli.main import run
from casa.evaluation.metrics import LIVE, METRICS
from casa.evaluation.standard import STANDARD
from casa.media import VideoWriter, read_frames
from casa.models import auto

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)( no-run)?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, kept, text in BLOCKS if kind == "sh" and not kept for line in text.splitlines()]
KEPT = [line for kind, kept, text in BLOCKS if kind == "sh" and kept for line in text.splitlines()]
PROGRAMS = [text for kind, _, text in BLOCKS if kind == "python"]
FILM = Path(casa.__file__).parent / "assets" / "demo" / "clip.mp4"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that the page speaks of, with the model loaded once for all examples."""
    loaded = auto.load_pretrained("casa-tiny", "cpu")
    monkeypatch.setattr(auto, "load_pretrained", lambda *_: loaded)
    monkeypatch.setattr("casa.pipeline.load_pretrained", lambda *_: loaded)
    shutil.copy(ROOT / "docs" / "images" / "page.png", tmp_path)
    for name, text in zip(
        ("qa.jsonl", "live.jsonl"), [text for kind, _, text in BLOCKS if kind == "json"], strict=True
    ):
        (tmp_path / name).write_text(text)
    with VideoWriter(tmp_path / "clip.mp4", (336, 336), fps=10) as video:
        for frame in read_frames(FILM, fps=10, end=3.0):
            video.write(frame.image)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run(here, monkeypatch, capsys):
    told = {}
    for line in LINES:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            run()
        except SystemExit as end:
            assert end.code in (0, None), (line, capsys.readouterr().err)  # noqa: PT017
        told[line] = capsys.readouterr()
    first = told[LINES[0]]
    assert "qa.jsonl:4: There is no picture" in first.err
    # as the page says, but for the time it took
    for printed in re.findall(r"^    ((?:anls|exact) .*)$", PAGE, re.MULTILINE):
        assert printed in first.out
    answers = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    assert [line.get("answer") for line in answers] == ["797", "236", "9", None]
    assert json.loads((here / "scores.json").read_text())["scores"]["data"]["n"] == 3
    (watched,) = [json.loads(line) for line in (here / "captions.jsonl").read_text().splitlines()]
    assert watched["truth"] == [[0.0, "door"], [0.5, "7"]]
    assert "live_wer" in told[next(line for line in LINES if "live.jsonl" in line)].out


@pytest.mark.slow
def test_the_programs_run(here, capsys):
    for text in PROGRAMS:
        exec(compile(text, "docs/evaluation.md", "exec"), {})
    assert "['797', '236', '9']" in capsys.readouterr().out


@pytest.mark.parametrize("line", KEPT)
def test_a_command_that_cannot_run_here_has_its_options(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["casa", "eval", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run()
    told, words = capsys.readouterr().out, shlex.split(line)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", told), word
    if "--tasks" in words:
        assert set(words[words.index("--tasks") + 1].split(",")) <= set(STANDARD)


def test_the_tables_are_whole():
    for name in (*METRICS, LIVE):
        assert re.search(rf"^\| (`\w+`, )?`{name}`", PAGE, re.MULTILINE), name
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w-]+/[^\n]*)$", PAGE, re.MULTILINE))
    assert set(rows) == set(STANDARD)
    for name, task in STANDARD.items():
        place, split, *_ = (cell.strip() for cell in rows[name].split("|"))
        assert place.split(",")[0] == task.hub
        assert split == task.split
        assert f"`{task.metric}`" in rows[name]
