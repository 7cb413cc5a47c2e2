"""`casa caption`: stopped and gone on with, how it opens a stream, and where it records."""

import math

import pytest

from casa.captioning import CaptionReport
from casa.captioning import run as module
from casa.captioning.outputs import RunState
from casa.errors import UserError


@pytest.fixture(scope="module")
def film(noise_film):
    return noise_film(3)


@pytest.mark.slow
def test_stopped_and_resumed(casa, checkpoint, film, tmp_path, monkeypatch):
    """Ctrl-C, of which a kill is the harder case (tests/captioning/test_kill.py)."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()

    def words(folder):
        outs = ("--out", folder / "a.srt", "--out", folder / "a.jsonl")
        settings = ("--fps", 5, "--max-text-tokens", 60, "--max-new-tokens", 4, "--save-every", 0)
        return ("caption", checkpoint, film, *outs, *settings)

    whole = casa(*words(one))
    assert (whole.status, whole.err) == (0, "")
    reached, left = RunState.reached, [6]

    def stopping(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        reached(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "reached", stopping)
        stopped = casa(*words(two))
    assert (stopped.status, stopped.err.splitlines()[-1]) == (130, "casa: stopped.")
    assert stopped.err.startswith("6 frames watched") or stopped.err.startswith("7 frames watched")
    assert (two / "a.srt.state").exists()
    resumed = casa(*words(two), "--resume")
    assert (resumed.status, resumed.err) == (0, "")
    assert float(resumed.out.split()[0]) > 1.0, "it did not begin at the beginning"
    assert whole.out.endswith(resumed.out)
    assert {path.name: path.read_bytes() for path in two.iterdir()} == {
        path.name: path.read_bytes() for path in one.iterdir()
    }


def test_how_a_stream_is_opened(casa, monkeypatch):
    given = []

    def opened(*arguments, **settings):
        given.append(settings)
        raise UserError("nobody there.")

    monkeypatch.setattr(module, "open_source", opened)
    assert casa("caption", "rtsp://here/a").err == "casa: nobody there.\n"
    options = ("--source-option", "rtsp_transport=udp", "--source-option", "headers=A: b=c")
    assert casa("caption", "rtsp://here/a", *options, "--reconnect-for", 60).status == 2
    assert (given[0]["options"], given[0]["backoff"]) == ({}, None)
    assert given[1]["options"] == {"rtsp_transport": "udp", "headers": "A: b=c"}
    assert (given[1]["backoff"].seconds, given[1]["backoff"].attempts) == (60, math.inf)


def test_where_it_was_recorded_is_told_if_the_name_was_taken(casa, monkeypatch, tmp_path):
    taken, free = tmp_path / "a.mkv", tmp_path / "a.2.mkv"
    for place, told in ((taken, ""), (free, f"{taken} was there already; this video is {free}.\n")):
        monkeypatch.setattr("casa.captioning.caption", lambda *_, place=place, **__: CaptionReport(recording=place))
        assert casa("caption", "camera:0", "--burn", taken).err == told
