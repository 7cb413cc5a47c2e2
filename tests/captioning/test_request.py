"""Settings that cannot be are refused before anything is opened, each in a sentence."""

import os
from pathlib import Path

import pytest

from casa.captioning import CaptionRequest
from casa.cli.live import parse_question
from casa.cli.options import pairs
from casa.errors import UserError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": (Path("a.txt"),)}, "a.txt has no known ending"),
        ({"burn": Path("a.srt")}, "a.srt has no known ending"),
        ({"track": Path("a.avi")}, "a.avi has no known ending"),
        ({"out": (Path("nowhere/a.srt"),)}, "folder of nowhere"),
        ({"out": (Path("here.srt"),)}, "here.srt is a directory"),
        ({"out": (Path("a.srt"), Path("./a.srt"))}, "same name"),
        ({"burn": Path("film.mp4"), "track": Path("a.mp4")}, "would replace the one"),
        ({"burn": Path("a.mp4"), "track": Path("a.mp4")}, "same name"),
        ({"resume": True}, "name them with out"),
        ({"hold": 0.0}, "hold"),
        ({"hold": float("inf")}, "hold"),
        ({"save_every": -1.0}, "save_every"),
        ({"save_every": float("nan")}, "save_every"),
        ({"cue": "now"}, "frame or said"),
        ({"source_options": {"rtsp_transport": "udp"}}, "cameras and addresses"),
        ({"reconnect_for": 60.0}, "cameras and addresses"),
        ({"reconnect_for": -1.0}, "0 or more"),
    ],
)
def test_what_cannot_be(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.srt").mkdir()
    with pytest.raises(UserError, match=words):
        CaptionRequest("film.mp4", **settings)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to root")
def test_where_nothing_may_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        CaptionRequest("film.mp4", (tmp_path / "a.srt",))


@pytest.mark.parametrize("source", ["-", "camera:0", "screen", "rtsp://here/stream", "."])
def test_a_text_track_needs_a_file_to_copy(source):
    with pytest.raises(UserError, match="use burn"):
        CaptionRequest(source, track=Path("a.mp4"))


@pytest.mark.parametrize(
    ("source", "is_file"),
    [("a.mp4", True), ("file:///a.mp4", True), ("-", False), ("https://here/a.mp4", False), (".", False)],
)
def test_what_is_a_file(source, is_file):
    assert CaptionRequest(source).is_file == is_file


def test_options_of_a_source():
    written = ["rtsp_transport=udp", "headers=A: b=c"]
    assert pairs(written, "--source-option", "") == {"rtsp_transport": "udp", "headers": "A: b=c"}
    for wrong in ("udp", "=udp", ""):
        with pytest.raises(UserError, match="rtsp_transport=udp"):
            pairs([wrong], "--source-option", "rtsp_transport=udp")


def test_no_password_is_written_into_a_state():
    options = {"headers": "Authorization: secret"}
    told = str(CaptionRequest("rtsp://me:secret@here/stream?key=secret", source_options=options).identity("tiny"))
    assert "here/stream" in told
    assert "secret" not in told


def test_a_film_may_move(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").write_bytes(b"the same")
    one, two = (CaptionRequest(str(tmp_path / folder / "a.mp4")).identity("tiny") for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a.mp4").write_bytes(b"another")
    assert CaptionRequest(str(tmp_path / "two" / "a.mp4")).identity("tiny") != one


def test_questions_as_they_are_written():
    assert parse_question("12.5=What is a = b?") == (12.5, "What is a = b?")
    assert parse_question("0= Who? ") == (0.0, "Who?")


@pytest.mark.parametrize("written", ["", "12", "=Who?", "x=Who?", "-1=Who?", "nan=Who?", "inf=Who?", "12= "])
def test_what_is_no_question(written):
    with pytest.raises(UserError, match="write it as"):
        parse_question(written)
