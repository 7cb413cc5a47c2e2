"""However a run ends, in any pace: its exit status, its summary, files that are whole and can be gone on with.

Real processes and real signals. Each is a fork of one that has loaded the model, and ends as the program does.
"""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from casa.captioning import GracefulStop
from casa.media import read_captions

# reads a line of JSON per run: its words, where its stdout and stderr go, how many bytes a file may have, and a program
FORKS = """
import gc, json, os, resource, signal, sys, time
import torch
torch.set_num_threads(1)
from casa.cli.main import run
from casa.captioning import caption
from casa.media import VideoSource
from casa.models import auto
from casa.testing import tiny_casa, tiny_processor
model = tiny_casa(dtype=torch.float32)
model.generation_config.eos_token_id = 2
model.backbone.lm_head.weight.data[2] = model.backbone.lm_head.weight.data[3:].mean(0) * 3
auto.load_pretrained = lambda *_: (model, tiny_processor())
gc.freeze()
for line in sys.stdin:
    words, out, err, most, program = json.loads(line)
    child = os.fork()
    if not child:
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY), number)
        if most:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        sys.argv = ["casa", *words]
        exec(program)
        run()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

fcntl = pytest.importorskip("fcntl", reason="needs named pipes")


@pytest.fixture(scope="module")
def forks():
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        yield parent
        parent.stdin.close()


@pytest.fixture(scope="module")
def film(noise_film):
    """More captions than fit into the pipe: a run that nobody listens to is never over."""
    return noise_film(60)


class Run:
    """`casa caption`, running. lines: its stdout, to be read."""

    def __init__(self, forks, folder, *words, most=0, program=""):
        self._forks, self._err = forks, folder / "err"
        os.mkfifo(folder / "out")
        self._err.touch()
        told = [
            ["caption", "--max-new-tokens", "4", "tiny", *map(str, words)],
            str(folder / "out"),
            str(self._err),
            most,
            program,
        ]
        forks.stdin.write(json.dumps(told).encode() + b"\n")
        forks.stdin.flush()
        self.pid = int(forks.stdout.readline())
        self.lines = (folder / "out").open("rb")
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(self.lines, fcntl.F_SETPIPE_SZ, 4096)

    def end(self, hearing=True):
        """(exit status, or minus the signal that ended it; the lines of its stderr). hearing: all it says, first."""
        with self.lines:
            if hearing:
                self.lines.read()
        return os.waitstatus_to_exitcode(int(self._forks.stdout.readline())), self._err.read_text().splitlines()


def outs(folder):
    return "--out", folder / "a.srt", "--out", folder / "a.jsonl"


PACES = {"every frame": ("--fps", 8), "live pace": ("--fps", 8, "--live")}
# a frame takes long to encode; a thread that is still at it when Python ends would abort the process, and is named
SLOW = """
from casa.streaming import StreamingSession
import atexit, threading
encode = StreamingSession.encode
StreamingSession.encode = lambda *given: (time.sleep(0.2), encode(*given))[1]
atexit.register(lambda: [print(t.name, "is left", file=sys.stderr) for t in threading.enumerate() if t.daemon])
"""
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("pace", PACES)
def test_a_signal(forks, film, tmp_path, pace, number):
    words = (*outs(tmp_path), *PACES[pace], "--save-every", 0, "--burn", tmp_path / "a.mp4")
    run = Run(forks, tmp_path, film, *words, program=SLOW)
    # the first frame's state is there with the second caption
    assert run.lines.readline()
    assert run.lines.readline()
    os.kill(run.pid, number)
    status, told = run.end()
    assert status == 128 + number
    assert told[-1] == "casa: stopped."
    assert "frames watched" in told[-2]
    assert len(told) == 2
    captions = read_captions(tmp_path / "a.srt")
    assert captions
    assert captions == read_captions(tmp_path / "a.jsonl")
    assert (tmp_path / "a.srt.state").exists()
    assert not (tmp_path / "a.mp4").exists(), "the captioned film needs all captions"


@pytest.mark.slow
def test_stopped_and_gone_on_with(forks, film, tmp_path):
    """The files are, to the byte, those of a run that nobody stopped."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = ("--end", 3, "--save-every", 0, "--max-text-tokens", 96)
    for folder in (whole, stopped):
        folder.mkdir()
        run = Run(forks, folder, film, *outs(folder), *words)
        if folder is stopped:
            assert run.lines.readline()
            assert run.lines.readline()
            os.kill(run.pid, signal.SIGTERM)
        assert run.end()[0] == (143 if folder is stopped else 0)
    for name in ("out", "err"):
        (stopped / name).unlink()
    assert Run(forks, stopped, film, *outs(stopped), *words, "--resume").end() == (0, [])
    for name in ("a.srt", "a.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
def test_a_second_signal_ends_at_once(forks, film, tmp_path, pace):
    """A source that never lets go, as a camera whose driver hangs."""
    # in short sleeps: a signal that comes just before a long one begins is heard at its end only
    program = "VideoSource.close = lambda self: (print('closing', flush=True), [time.sleep(0.1) for _ in range(36000)])"
    run = Run(forks, tmp_path, film, *outs(tmp_path), *PACES[pace], program=program)
    assert run.lines.readline()
    os.kill(run.pid, signal.SIGINT)
    while b"closing" not in (line := run.lines.readline()):
        assert line
    os.kill(run.pid, signal.SIGINT)
    assert run.end() == (130, [])
    assert read_captions(tmp_path / "a.srt") == read_captions(tmp_path / "a.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("what", ["captions", "state"])
def test_a_full_disk(forks, film, tmp_path, pace, what):
    program = "from casa.captioning.outputs import RunState; RunState.save = lambda *_: None"
    most, program = (500, program) if what == "captions" else (4000, "")
    run = Run(forks, tmp_path, film, *outs(tmp_path), *PACES[pace], most=most, program=program)
    status, told = run.end()
    assert (status, len(told)) == (2, 2)
    assert "frames watched" in told[0]
    assert ("cannot be written" if what == "captions" else "cannot be saved") in told[1]
    captions = read_captions(tmp_path / "a.srt")
    assert captions
    assert captions[: len(read_captions(tmp_path / "a.jsonl"))] == read_captions(tmp_path / "a.jsonl")[: len(captions)]


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
def test_a_closed_pipe(forks, film, tmp_path, pace):
    """`casa caption ... | head -1`"""
    run = Run(forks, tmp_path, film, *outs(tmp_path), *PACES[pace])
    assert run.lines.readline()
    status, told = run.end(hearing=False)
    assert status == 1
    assert [("frames watched" in line) for line in told] == [True]
    assert read_captions(tmp_path / "a.srt")


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
def test_the_end_of_the_source(forks, film, tmp_path, pace):
    run = Run(forks, tmp_path, film, *outs(tmp_path), *PACES[pace], "--end", 1)
    status, told = run.end()
    assert status == 0
    assert len(told) == (pace == "live pace"), "a clean run over a file has nothing to tell"
    assert not (tmp_path / "a.srt.state").exists()


class TestGracefulStop:
    """The signals themselves, in this process."""

    def test_what_is_written_is_written_first(self):
        done = []

        def write(ending):
            with ending.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("written")

        with GracefulStop() as ending, pytest.raises(KeyboardInterrupt):
            write(ending)
        assert done == ["written"]
        assert (ending.signal, ending.exit_status) == (signal.SIGTERM, 143)

    def test_what_is_ignored_stays_ignored_and_the_rest_comes_back(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with GracefulStop() as ending:
                os.kill(os.getpid(), signal.SIGHUP)
                assert signal.getsignal(signal.SIGINT) is ending
            assert ending.signal is None
            assert signal.getsignal(signal.SIGINT) is not ending
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_another_thread_listens_to_nothing(self):
        before, errors = signal.getsignal(signal.SIGINT), []

        def work():
            try:
                with GracefulStop():
                    assert signal.getsignal(signal.SIGINT) is before
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert errors == []
