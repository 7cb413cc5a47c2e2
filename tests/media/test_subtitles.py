"""Subtitle files: written, read back, and safe whatever the text."""

import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.errors import UserError
from casa.media.subtitles import (
    FORMATS,
    Caption,
    captions_from_frames,
    captions_text,
    read_captions,
    tidy,
    write_captions,
)

# Free text, and text made of what the formats themselves are made of.
spice = st.sampled_from(
    ["-->", "<i>", "&amp;", "&lt;", "\n", "\n\n", "\r", " ", "4071", "00:00:01,000 --> 00:00:02,000", "NOTE", "\x85"]
)
texts = st.one_of(st.text(max_size=20), st.lists(spice, max_size=6).map("".join))
captions = st.builds(
    lambda start, length, text: Caption(start, start + length, text),
    st.floats(0, 400_000),
    st.floats(0.0001, 100),
    texts,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("subtitles")


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@given(given_captions=st.lists(captions, max_size=6))
@settings(max_examples=150, deadline=None)
def test_round_trip(folder, kind, given_captions):
    write_captions(folder / f"a{kind}", given_captions)
    assert read_captions(folder / f"a{kind}") == tidy(given_captions)


@given(st.lists(captions, max_size=8))
@settings(max_examples=150, deadline=None)
def test_tidy_is_in_order_without_overlap_and_final(given_captions):
    done = tidy(given_captions)
    assert all(a.end <= b.start for a, b in pairwise(done))
    assert all(round(c.start * 1000) < round(c.end * 1000) for c in done)
    assert tidy(done) == done


def test_srt_to_the_letter(tmp_path):
    write_captions(tmp_path / "a.srt", [Caption(59.9996, 61.5, "4071"), Caption(3600, 3601, "a\n\n  b ")])
    assert (tmp_path / "a.srt").read_bytes() == (
        b"1\n00:01:00,000 --> 00:01:01,500\n4071\n\n2\n01:00:00,000 --> 01:00:01,000\na\nb\n\n"
    )


def test_vtt_to_the_letter(tmp_path):
    write_captions(tmp_path / "a.vtt", [Caption(0, 1.25, "a & b <i> --> ü")])
    assert (tmp_path / "a.vtt").read_text(encoding="utf-8") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\na &amp; b &lt;i&gt; --&gt; ü\n\n"
    )


def test_jsonl_to_the_letter(tmp_path):
    write_captions(tmp_path / "a.jsonl", [Caption(0, 1, "ü\n2")])
    assert (tmp_path / "a.jsonl").read_text("utf-8") == '{"start": 0.0, "end": 1.0, "text": "ü\\n2"}\n'


def test_overlaps_are_cut_and_same_starts_joined():
    done = tidy([Caption(2, 4, "c"), Caption(0, 3, "a"), Caption(2, 3, "d"), Caption(5, 6, " \n ")])
    assert done == [Caption(0, 2, "a"), Caption(2, 4, "c\nd")]


def test_a_flash_lasts_a_millisecond():
    assert tidy([Caption(1, 1.0001, "a")]) == [Caption(1, 1.001, "a")]


@pytest.mark.parametrize("times", [(-1, 1), (1, 1), (2, 1), (float("nan"), 1), (0, float("inf"))])
def test_impossible_times(times):
    with pytest.raises(ValueError, match="A caption from"):
        Caption(*times, "a")


def test_nothing_to_write(tmp_path):
    for kind in FORMATS:
        write_captions(tmp_path / f"a{kind}", [])
        assert read_captions(tmp_path / f"a{kind}") == []


def test_foreign_srt(tmp_path):
    (tmp_path / "a.srt").write_bytes(
        "\ufeff1\r\n0:00:01.5 --> 00:00:02,000 X1:0\r\nHi\r\n\r\n\r\n00:03,000 --> 00:04,000\r\nthere".encode()
    )
    assert read_captions(tmp_path / "a.srt") == [Caption(1.5, 2, "Hi"), Caption(3, 4, "there")]


def test_foreign_vtt(tmp_path):
    (tmp_path / "a.vtt").write_text(
        "WEBVTT - title\nKind: captions\n\nNOTE a --> b\nmore\n\nSTYLE\n::cue {}\n\n"
        "intro\n00:01.000 --> 00:02.000 align:start\n<v Ann>Hello <b>you</b> &amp;lt;\n"
    )
    assert read_captions(tmp_path / "a.vtt") == [Caption(1, 2, "Hello you &lt;")]


def test_files_that_cannot_be_read(tmp_path):
    for kind, sentence in (
        ("srt", "line 2: write the times"),
        ("vtt", "does not begin with WEBVTT"),
        ("jsonl", "line 1: write one"),
        ("txt", r"no caption file: let it end in \.srt"),
    ):
        (tmp_path / f"bad.{kind}").write_text("1\nnot a time\ntext\n")
        with pytest.raises(UserError, match=sentence):
            read_captions(tmp_path / f"bad.{kind}")
    (tmp_path / "bad.vtt").write_text("")
    with pytest.raises(UserError, match="does not begin with WEBVTT"):
        read_captions(tmp_path / "bad.vtt")
    (tmp_path / "bad.srt").write_text("1\n00:00:02,000 --> 00:00:01,000\ntext\n")
    with pytest.raises(UserError, match=r"line 2: .* end after its start"):
        read_captions(tmp_path / "bad.srt")
    for kind in FORMATS:
        (tmp_path / f"bad{kind}").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(UserError, match="not UTF-8"):
            read_captions(tmp_path / f"bad{kind}")
        with pytest.raises(UserError, match="check its name"):
            read_captions(tmp_path / f"missing{kind}")


def test_an_exception_midway_leaves_nothing(tmp_path):
    def breaks():
        yield Caption(0, 1, "a")
        raise RuntimeError("model failed")

    for kind in FORMATS:
        with pytest.raises(RuntimeError):
            write_captions(tmp_path / f"a{kind}", breaks())
    assert os.listdir(tmp_path) == []


def test_captions_from_frames():
    times = [0, 0.5, 1, 1.5, 8, 8.5, 20]
    said = ["", "a", "", "b ", "c", "c", "d"]
    assert captions_from_frames(times, said, end=21) == [
        Caption(0.5, 1.5, "a"),
        Caption(1.5, 4.5, "b"),  # held for 3 s
        Caption(8, 11.5, "c"),  # said again while on screen
        Caption(20, 21, "d"),  # until the video ends
    ]
    assert captions_from_frames([0, 1], ["a", "b"], end=0.5)[-1] == Caption(1, 4, "b")
    assert captions_from_frames([0], ["a"], hold=1) == [Caption(0, 1, "a")]
    assert captions_from_frames([], [], end=0) == []


@pytest.mark.parametrize(
    ("times", "said", "hold"), [([0], [], 3), ([0, 0], ["a", "b"], 3), ([0], ["a"], 0), ([0], ["a"], float("nan"))]
)
def test_captions_from_frames_refuses(times, said, hold):
    with pytest.raises(ValueError, match=r"give|sort"):
        captions_from_frames(times, said, hold=hold)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_without_a_file(kind, tmp_path):
    said = [Caption(0.5, 2, "é <b>", 0.25), Caption(1, 3, "two\n\nlines")]
    write_captions(tmp_path / f"a{kind}", said)
    text = captions_text(said, FORMATS[kind])
    assert text.encode() == (tmp_path / f"a{kind}").read_bytes()
    assert "<b>" in text or "&lt;b&gt;" in text


def test_captions_from_live_frames_have_their_lag():
    found = captions_from_frames([0, 1, 2, 3], ["a", "a", "", "b"], lags=[0.1, 0.2, None, 0.4])
    assert [(one.start, one.text, one.lag) for one in found] == [(0, "a", 0.1), (3, "b", 0.4)]
    with pytest.raises(UserError, match="1 lags"):
        captions_from_frames([0, 1], ["a", "b"], lags=[0.1])
