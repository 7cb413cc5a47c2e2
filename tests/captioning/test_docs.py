"""docs/streaming.md: each example runs, in order, in one folder with the beginning of the shipped film in it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import casa
from casa.cli.main import run
from casa.media import VideoWriter, read_frames
from casa.models import auto

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)( no-run)?\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, kept, text in BLOCKS if kind == "sh" and not kept for line in text.splitlines()]
KEPT = [line for kind, kept, text in BLOCKS if kind == "sh" and kept for line in text.splitlines()]
PROGRAMS = [text for kind, _, text in BLOCKS if kind == "python"]
FILM = Path(casa.__file__).parent / "assets" / "demo" / "clip.mp4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    with VideoWriter(folder / "clip.mp4", (336, 336), fps=10) as video:
        for frame in read_frames(FILM, fps=10, end=5.0):
            video.write(frame.image)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """In that folder, with the model loaded once for all examples."""
    if not hasattr(here, "loaded"):
        here.loaded = auto.load_pretrained("casa-tiny", "cpu")
    monkeypatch.setattr(auto, "load_pretrained", lambda *_: here.loaded)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_command_runs(line, here, monkeypatch, capsys):
    if "|" in line:
        if shutil.which("ffmpeg") is None:
            pytest.skip("needs ffmpeg")
        program = f"{shlex.quote(sys.executable)} -c 'from casa.cli.main import run; run()'"
        done = subprocess.run(line.replace("| casa", f"| {program}"), shell=True, capture_output=True, text=True)
        assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr
        return
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code in (0, None), capsys.readouterr().err
    for name in re.findall(r"--(?:out|burn|track) (\S+)", line):
        assert (here / name).stat().st_size > 0


@pytest.mark.slow
def test_the_programs_run(here, capsys):
    names: dict = {}
    for text in PROGRAMS:
        exec(compile(text, "docs/streaming.md", "exec"), names)
    assert (here / "live.srt").exists()
    assert "door 7" in capsys.readouterr().out, "the film begins with a number"


@pytest.mark.parametrize("line", KEPT)
def test_a_command_that_cannot_run_here_has_its_options(line, monkeypatch, capsys):
    words = shlex.split(line)
    verb = words[1:3] if words[1] == "bench" else words[1:2]
    monkeypatch.setattr(sys, "argv", ["casa", *verb, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run()
    told = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", told), word


def test_there_are_examples():
    assert len(LINES) >= 6
    assert len(KEPT) >= 8
    assert len(PROGRAMS) == 2
