"""Captions on disk as they are said: valid after each, after a kill, and continued after it."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.errors import UserError
from casa.media.subtitles import (
    Caption,
    CaptionFile,
    CaptionList,
    captions_from_frames,
    read_captions,
    tidy,
    write_captions,
)

KINDS = ("srt", "vtt", "jsonl")

# Two captions one after another never say the same, so that `tidy` is the whole rule.
said = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(1, 3000), st.sampled_from(["a", "b <i>\n\n--> x", "é\nf", "   "])),
    max_size=8,
).map(
    lambda rows: [
        Caption(start / 1000, (start + length) / 1000, f"{k} {text}" if text.strip() else text)
        for k, (start, length, text) in enumerate(sorted(rows, key=lambda row: row[0]))
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("captions")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(captions=said)
@settings(max_examples=60, deadline=None)
def test_valid_after_each_and_as_if_written_at_once(folder, kind, captions):
    path = folder / f"a.{kind}"
    with CaptionFile(path) as writer:
        for k, caption in enumerate(captions, start=1):
            writer.say(caption.start, caption.end, caption.text)
            assert read_captions(path) == tidy(captions[:k])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_as_written_at_once(tmp_path, kind):
    captions = [Caption(0.5, 3.5, "one"), Caption(2, 5, "two & <3>"), Caption(9.25, 12.25, "three")]
    with CaptionFile(tmp_path / f"a.{kind}") as writer:
        for caption in captions:
            writer.say(caption.start, caption.end, caption.text)
        writer.close(end=10.25)
    write_captions(tmp_path / f"b.{kind}", [*captions[:2], Caption(9.25, 10.25, "three")])
    assert (tmp_path / f"a.{kind}").read_text("utf-8") == (tmp_path / f"b.{kind}").read_text("utf-8")


def test_as_captions_from_frames_would_have_it(tmp_path):
    times = [0, 0.5, 1, 1.5, 8, 8.5, 20]
    texts = ["", "a", "", "b ", "c", "c", "d"]
    with CaptionFile(tmp_path / "a.srt") as writer:
        for time, text in zip(times, texts, strict=True):
            writer.say(time, time + 3.0, text)
        writer.close(end=21)
    assert read_captions(tmp_path / "a.srt") == captions_from_frames(times, texts, end=21)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_anywhere_then_resumed(tmp_path, kind):
    """Whatever part of the file reached the disk, what was whole stays, and the rest is written again."""
    captions = [Caption(k, k + 0.5, text) for k, text in enumerate(["one", "two\nlines of it", "ünf"])]
    path = tmp_path / f"a.{kind}"
    write_captions(path, captions)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        writer = CaptionFile(path, resume=True)
        kept = read_captions(path)
        assert kept == captions[: len(kept)]
        assert len(kept) >= sum(whole[:cut].count(mark) for mark in MARKS[kind]) - (kind == "vtt")
        with writer:
            for caption in captions[len(kept) :]:
                writer.say(caption.start, caption.end, caption.text)
        assert path.read_bytes() == whole


MARKS = {"srt": [b"\n\n"], "vtt": [b"\n\n"], "jsonl": [b"\n"]}


def test_lag_is_kept_with_what_it_is_of(tmp_path):
    path = tmp_path / "a.jsonl"
    with CaptionFile(path) as writer:
        writer.say(0, 3, "one", 0.25)
        writer.say(1, 4, "two", 0.125)
        writer.say(2, 5, "two", 0.5)
    before = path.read_bytes()
    CaptionFile(path, resume=True).close()
    assert path.read_bytes() == before
    captions = read_captions(path)
    assert [(c.end, c.text, c.lag) for c in captions] == [(1, "one", 0.25), (5, "two", 0.125)]
    write_captions(tmp_path / "b.jsonl", captions)
    assert [c.lag for c in read_captions(tmp_path / "b.jsonl")] == [0.25, 0.125]


def test_resumed_from_an_earlier_state(tmp_path):
    """What the saved state has not said yet is said again, not twice; the caption before it can still be cut short."""
    path = tmp_path / "a.srt"
    with CaptionFile(path) as writer:
        for start, text in ((1, "a"), (2, "b"), (3, "c")):
            writer.say(start, start + 3, text)
    whole = path.read_bytes()
    with CaptionFile(path, resume=True, until=2) as writer:
        assert read_captions(path) == [Caption(1, 2, "a")]
        writer.say(2, 5, "b")
        writer.say(3, 6, "c")
    assert path.read_bytes() == whole
    with CaptionFile(path, resume=True) as writer:
        writer.say(4, 7, "d")
    assert read_captions(path)[-2:] == [Caption(3, 4, "c"), Caption(4, 7, "d")]
    assert "\n4\n" in path.read_text()


KILLED = """
import sys
from casa.media import CaptionFile
writer = CaptionFile(sys.argv[1])
for k in range(10**9):
    writer.say(k, k + 1.5, f"caption {k}\\nof many")
    if k == 50:
        print("go", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_the_middle_of_writing(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        child.send_signal(signal.SIGKILL)
    captions = read_captions(path)
    assert len(captions) > 50
    assert [c.text for c in captions] == [f"caption {k}\nof many" for k in range(len(captions))]
    assert all(a.end == b.start for a, b in pairwise(captions))
    with CaptionFile(path, resume=True) as writer:
        writer.say(len(captions), len(captions) + 1, "after")
    assert len(read_captions(path)) == len(captions) + 1


def test_what_was_there_is_replaced_unless_resumed(tmp_path):
    path = tmp_path / "a.vtt"
    path.write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nold\n\n" * 1)
    CaptionFile(path).close()
    assert path.read_text() == "WEBVTT\n\n"
    path.unlink()
    CaptionFile(path, resume=True).close()  # nothing to resume
    assert path.read_text() == "WEBVTT\n\n"


def test_a_correction_that_is_shorter_leaves_valid_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    with CaptionFile(path) as writer:
        writer.say(0.25, 10.125, "a")
        writer.say(1, 2, "b")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["start"], row["end"]) for row in rows] == [(0.25, 1), (1, 2)]


def test_order_and_times(tmp_path):
    with CaptionFile(tmp_path / "a.srt") as writer:
        writer.say(2, 3, "b")
        with pytest.raises(UserError, match="say them in order"):
            writer.say(1, 1.5, "a")
        with pytest.raises(UserError, match="let it end after"):
            writer.say(4, 4, "a")
        writer.close(end=0.5)  # before the caption began: not its end
        assert read_captions(tmp_path / "a.srt") == [Caption(2, 3, "b")]
        with pytest.raises(RuntimeError, match="closed"):
            writer.say(5, 6, "c")
    writer.close()


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"no caption file: let it end in \.srt, \.vtt, \.jsonl"):
        CaptionFile(tmp_path / "a.txt")
    with pytest.raises(UserError, match="cannot be written"):
        CaptionFile(tmp_path / "no" / "a.srt")
    (tmp_path / "dir.srt").mkdir()
    for resume in (False, True):
        with pytest.raises(UserError, match=r"cannot be (written|read)"):
            CaptionFile(tmp_path / "dir.srt", resume=resume)
    (tmp_path / "a.srt").write_text("a letter to my aunt\nof two lines\n\n")
    with pytest.raises(UserError, match="line 1: write the times"):
        CaptionFile(tmp_path / "a.srt", resume=True)
    assert (tmp_path / "a.srt").read_text().startswith("a letter")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    os.symlink("/dev/full", tmp_path / "a.vtt")
    with pytest.raises(UserError, match=r"cannot be written .*: free some space"):
        CaptionFile(tmp_path / "a.vtt")


def test_a_list_holds_what_a_file_would(tmp_path):
    """New captions are added, and the last one is corrected: its end, and where it is said again."""
    held = []
    with CaptionList() as said, CaptionFile(tmp_path / "a.srt") as file:
        for start, end, text in ((0, 3, "a"), (1, 4, "a"), (2, 5, "b")):
            said.say(start, end, text)
            file.say(start, end, text)
            held.append(list(said.captions))
        said.close(end=4)
        file.close(end=4)
    assert held == [[Caption(0, 3, "a")], [Caption(0, 4, "a")], [Caption(0, 2, "a"), Caption(2, 5, "b")]]
    assert said.captions == read_captions(tmp_path / "a.srt") == [Caption(0, 2, "a"), Caption(2, 4, "b")]
