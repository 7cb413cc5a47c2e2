"""Video through pipes: into another process, a named pipe, a file object; and letting go of one that says nothing."""

import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from casa.errors import UserError
from casa.media.sources import PipeSource, is_pipe, open_source
from casa.testing import PATIENCE

READER = """
from casa.media.sources import open_source
with open_source("-", fps=5) as source:
    print(source.describe, source.is_live)
    for frame in source:
        print(round(frame.time, 3), round((float(frame.picture.mean()) - 10) / 5))
"""
KINDS = {
    "mkv": {},
    "ts": {"format": "mpegts"},
    "mjpeg": {"format": "mjpeg", "codec": "mjpeg", "pixels": "yuvj420p"},
}


@pytest.fixture
def piped(tmp_path, clips):
    """Bytes of 20 frames, one every 0.1 s (MJPEG, which has no clock: 0.04 s)."""

    def make(kind):
        path = clips.write(tmp_path / f"a.{kind}", range(0, 2000, 100), **KINDS[kind])
        return path.read_bytes()

    return make


@pytest.mark.parametrize("kind", ["mkv", "mjpeg"])
def test_standard_input(piped, kind):
    done = subprocess.run([sys.executable, "-c", READER], input=piped(kind), capture_output=True, timeout=PATIENCE)
    lines = done.stdout.decode().splitlines()
    assert done.stderr == b""
    assert lines[0] == f"standard input: 64 x 48, {'h264' if kind == 'mkv' else 'mjpeg'} False"
    rows = [line.split() for line in lines[1:]]
    expected = [(k * 0.2, 2 * k) for k in range(10)] if kind == "mkv" else [(k * 0.2, 5 * k) for k in range(4)]
    assert [(float(t), int(n)) for t, n in rows] == [(pytest.approx(t), n) for t, n in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_object(piped, kind):
    file = io.BytesIO(piped(kind))
    with open_source(file, fps=1000) as source:
        assert len(list(source)) == 20
    assert not file.closed  # whoever opened it closes it


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe(tmp_path, piped, clips):
    data = piped("mkv")
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert is_pipe(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    with open_source(path, fps=5, live=True) as source:
        assert source.is_live
        assert [clips.number(f.picture) for f in source] == list(range(0, 20, 2))
    writer.join(PATIENCE)


@pytest.mark.parametrize("kind", ["mkv", "ts"])
def test_closing_a_pipe_that_says_nothing_more(tmp_path, clips, kind):
    """A reader waits for data; closing ends it though the other side stays open."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = clips.write(tmp_path / f"a.{kind}", range(0, 2900, 100), picture=noise, **KINDS[kind]).read_bytes()
    data = data[:60_000]  # what a pipe takes without a reader
    out, into = os.pipe()
    with os.fdopen(into, "wb", buffering=0) as writable, os.fdopen(out, "rb", buffering=0) as readable:
        writable.write(data[: len(data) * 3 // 4])
        # should opening ever wait for more, the pipe ends after all, and the test fails rather than hangs
        giving_up = threading.Timer(PATIENCE, writable.close)
        giving_up.start()
        source = PipeSource(f"/dev/fd/{readable.fileno()}", fps=1000, live=True)
        assert next(source).time == 0
        reader = threading.Thread(target=list, args=(source,), daemon=True)
        reader.start()
        time.sleep(0.05)  # by now it has read what there is, and waits
        source.close()
        reader.join(PATIENCE)
        giving_up.cancel()
        assert not writable.closed
        assert not reader.is_alive()
        assert list(source) == []


@pytest.mark.parametrize("data", [b"", b"this is no video\n" * 100, bytes(range(256)) * 40])
def test_what_is_no_video(data):
    with pytest.raises(
        UserError, match=r"no video that can be read from a pipe: send MPEG-TS|holds no|no picture size"
    ):
        open_source(io.BytesIO(data))


def test_a_plain_mp4_cannot_be_piped(tmp_path, clips):
    """Its index stands at the end."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    data = clips.write(tmp_path / "a.mp4", range(0, 2000, 100), size=(128, 96), picture=noise).read_bytes()

    class Forwards(io.RawIOBase):
        def __init__(self):
            self.rest = io.BytesIO(data)

        def readable(self):
            return True

        def read(self, size=-1):
            return self.rest.read(size)

        def seekable(self):
            return False

    with pytest.raises(UserError, match="fragmented MP4"):
        list(open_source(Forwards()))


def test_nothing_piped_in(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(UserError, match=r"Nothing is piped in: write ffmpeg .* \| casa caption -"):
        open_source("-")


def test_a_path_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        PipeSource(tmp_path / "missing")
    assert not is_pipe(tmp_path / "missing")
