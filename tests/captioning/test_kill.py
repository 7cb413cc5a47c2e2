"""`kill -9` in mid-video, then `--resume`: the caption files are, to the byte, those of a run that nobody stopped."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import casa
from casa.captioning import CaptionRequest, caption
from casa.media import read_captions
from casa.models.auto import load_pretrained

FILM = Path(casa.__file__).parent / "assets" / "demo" / "clip.mp4"
END = 10.0  # s
KINDS = ("srt", "vtt", "jsonl")
# the program itself; with a number, it dies at the moment at which that save would replace the one before; with a
# second, it waits behind so many captions until it is killed
PROGRAM = """
import builtins, os, signal, sys, time
import torch
torch.set_num_threads(1)
last, hold, replace, tell = int(sys.argv.pop(1)), int(sys.argv.pop(1)), os.replace, print
def held(*words, **how):
    global hold
    tell(*words, **how)
    hold -= 1
    if hold == 0:
        time.sleep(3600)
builtins.print = held
def dying(*names):
    global last
    last -= 1
    if last == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = dying
sys.argv[0] = "casa"
from casa.cli.main import run
run()
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module")
def load():
    """casa-tiny, loaded once."""
    loaded = load_pretrained("casa-tiny", "cpu")
    return lambda _: loaded


def request_to(folder: Path, **settings) -> CaptionRequest:
    outs = tuple(folder / f"a.{kind}" for kind in KINDS)
    return CaptionRequest(str(FILM), outs, end=END, max_text_tokens=96, max_new_tokens=8, save_every=0, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, load):
    """What a run that nobody stops writes, and says."""
    folder = tmp_path_factory.mktemp("whole")
    caption(request_to(folder), "casa-tiny", load)
    captions = read_captions(folder / "a.srt")
    assert len(captions) > 4, "there is something to lose"
    return {kind: (folder / f"a.{kind}").read_bytes() for kind in KINDS}, [one.text for one in captions]


def start(folder: Path, dies_in_save: int, *more: object, hold: int = 0) -> subprocess.Popen:
    outs = [part for kind in KINDS for part in ("--out", str(folder / f"a.{kind}"))]
    settings = ["--end", END, "--max-text-tokens", 96, "--max-new-tokens", 8, *more]
    words = ["caption", "casa-tiny", str(FILM), *outs, *map(str, settings)]
    command = [sys.executable, "-c", PROGRAM, str(dies_in_save), str(hold), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def assert_valid_and_then_the_same(folder: Path, whole, load) -> None:
    files, texts = whole
    for kind in KINDS:
        said = [one.text for one in read_captions(folder / f"a.{kind}")]
        assert said == texts[: len(said)], "what was said before the kill is there, and readable"
    caption(request_to(folder, resume=True), "casa-tiny", load)
    assert {kind: (folder / f"a.{kind}").read_bytes() for kind in KINDS} == files
    left = [path.name for path in folder.iterdir() if not path.name.startswith(".casa-")]
    assert sorted(left) == ["a.jsonl", "a.srt", "a.vtt"], "a finished run leaves no state"


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, whole, load):
    """With states as seldom as they are saved unless told; the first frame's is there with the second caption."""
    lines, wait = random.randrange(2, len(whole[1]) - 1), random.uniform(0, 0.3)
    with start(tmp_path, 0, hold=len(whole[1])) as child:
        assert child.stdout is not None
        for _ in range(lines):
            assert child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL, f"it was over after {lines} lines and {wait} s"
    assert (tmp_path / "a.srt.state").exists()
    assert len(read_captions(tmp_path / "a.srt")) >= lines
    assert_valid_and_then_the_same(tmp_path, whole, load)


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path, whole, load):
    saves = random.randrange(3, 16)
    with start(tmp_path, saves, "--save-every", 0) as child:
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".casa-") for path in tmp_path.iterdir()), "a state that was not finished"
    assert_valid_and_then_the_same(tmp_path, whole, load)
