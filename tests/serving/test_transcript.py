"""Transcripts become subtitle files, in order of time, and stay for a while after their stream."""

import json

import pytest

from casa.serving.live import Transcript, TranscriptStore


@pytest.fixture
def said():
    transcript = Transcript(10)
    for time, text in [(0.5, "one"), (2.0, "two <b>"), (2.5, "three")]:
        transcript.add(time, text)
    return transcript


def test_files(said):
    assert said.file("srt").startswith("1\n00:00:00,500 --> 00:00:02,000\none\n")
    assert said.file("vtt").startswith("WEBVTT\n")
    assert "two &lt;b&gt;" in said.file("vtt")
    rows = [json.loads(line) for line in said.file("jsonl").splitlines()]
    assert [row["text"] for row in rows] == ["one", "two <b>", "three"]


def test_going_back_in_a_video_keeps_the_order_of_time(said):
    said.add(1.0, "again")
    said.add(2.0, "two, better")
    assert [caption.text for caption in said.captions()] == ["one", "again", "two, better", "three"]


def test_nothing_said_and_too_much_said():
    transcript = Transcript(3)
    assert transcript.file("srt") == ""
    for number in range(9):
        transcript.add(float(number), str(number))
    assert [caption.text for caption in transcript.captions()] == ["6", "7", "8"]


def test_ended_streams_stay_for_a_while_and_not_too_many():
    now = 0.0
    shelf = TranscriptStore(2, 10.0, lambda: now)
    for name in "abc":
        shelf.open(name, Transcript(1))
    assert shelf.find("a") is not None
    for name in "abc":
        shelf.end(name)
    assert [shelf.find(name) is not None for name in "abc"] == [False, True, True]
    now = 11.0
    assert shelf.find("c") is None
    assert len(shelf) == 0
    shelf.end("never opened")


def test_lags_stand_in_jsonl_alone():
    transcript = Transcript(10)
    transcript.add(0.5, "one", 0.1234)
    transcript.add(1.0, "two")
    rows = [json.loads(line) for line in transcript.file("jsonl").splitlines()]
    assert [row.get("lag") for row in rows] == [0.123, None]
    assert "lag" not in rows[1]
    assert "0.123" not in transcript.file("srt") + transcript.file("vtt")
