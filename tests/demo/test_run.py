"""The whole demo on a film of three seconds with a tiny model of random weights, and what it refuses."""

import sys

import pytest
import torch
from PIL import Image

from casa.demo import DemoFilm, run, shipped_film
from casa.errors import UserError
from casa.media import captions_from_frames, probe, read_captions
from casa.media.subtitles import tidy
from casa.testing import tiny_casa, tiny_processor
from projects.casa_tiny.film import film

WRITTEN = {"captions.srt", "captions.vtt", "captions.jsonl", "captioned.mp4", "memory.png", "attention.png", "demo.png"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model and a film of three seconds whose truth is known."""
    folder = tmp_path_factory.mktemp("demo")
    model = tiny_casa(dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    film(folder / "film.mp4", seed=3, seconds=3, size=(224, 224))
    return folder


@pytest.mark.slow
def test_the_shipped_way_writes_everything_and_compares_with_the_truth(here, tmp_path, monkeypatch):
    clip = shipped_film(here / "film.mp4")
    monkeypatch.setattr(run, "shipped_film", lambda: clip)
    lines: list[str] = []
    found = run.run_demo(here / "model", out=tmp_path / "a" / "out", report=lines.append)
    assert {path.name for path in (tmp_path / "a" / "out").iterdir()} == WRITTEN
    assert {path.name for path in found.files} == WRITTEN
    captions = tidy(captions_from_frames(found.times, found.said, end=3.0))
    assert captions  # random weights babble
    for kind in ("srt", "vtt", "jsonl"):
        assert read_captions(tmp_path / "a" / "out" / f"captions.{kind}") == captions
    info = probe(tmp_path / "a" / "out" / "captioned.mp4")
    assert (info.width, info.height, info.frames) == (224, 224, 90)
    for name in ("memory.png", "attention.png"):
        with Image.open(tmp_path / "a" / "out" / name) as drawn:
            assert drawn.width > 1000

    assert found.times == tuple(k / 2 for k in range(6))
    assert found.truth == tuple(clip.truth(found.times))
    assert found.wer is not None
    assert all(row.insertion is not None for row in found.rows)
    figures = found.figures()
    assert (figures["frames"], figures["wer"]) == (6, found.wer)
    assert figures["insertion_cache_bytes"][1] > figures["cache_bytes"][1] > 0
    text = "\n".join(lines)
    number = max((text for _, text in clip.captions), key=len)
    assert f"{clip.captions[0][0]:6.1f} s" in text
    assert clip.captions[0][1] in text
    assert "word error rate" in text
    assert [answered.truth for answered in found.answers] == [number, str(len(number)), number[-1]]
    assert all(str(path) in text for path in found.files)


@pytest.mark.slow
def test_a_video_of_ones_own_has_no_truth(here, tmp_path):
    lines: list[str] = []
    (tmp_path / "captions.srt").write_text("of an earlier run")
    (tmp_path / "mine.txt").write_text("stays")
    found = run.run_demo(here / "model", here / "film.mp4", tmp_path, lines.append)
    assert (found.truth, found.wer) == (None, None)
    assert found.asked_at == 1.5  # the middle
    assert not any("error rate" in line for line in lines)
    assert "earlier" not in (tmp_path / "captions.srt").read_text()
    assert (tmp_path / "mine.txt").read_text() == "stays"


@pytest.mark.slow
def test_bad_requests_are_refused_before_anything_is_written(here, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="is a file"):
        run.run_demo(here / "model", here / "film.mp4", tmp_path / "file", print)
    with pytest.raises(UserError, match=r"text\.mp4"):
        run.run_demo(here / "model", tmp_path / "text.mp4", tmp_path / "out", print)
    with pytest.raises(UserError, match="nothing-here"):
        run.run_demo(tmp_path / "nothing-here", here / "film.mp4", tmp_path / "out", print)
    assert not any((tmp_path / "out").iterdir())


def test_a_film_is_not_watched_where_nothing_can_be_drawn(here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = []
    with pytest.raises(UserError, match=r"install casa-vlm\[plots\]"):
        run.run_demo(here / "model", here / "film.mp4", tmp_path / "out", told.append)
    assert told == []


def test_the_model_sees_frames_of_448_px_at_most():
    assert run._shrunk(Image.new("RGB", (1920, 1080))).size == (448, 252)
    assert run._shrunk(Image.new("RGB", (300, 448))).size == (300, 448)
    assert run._shrunk(Image.new("RGB", (9000, 10))).size == (448, 1)


def test_a_long_number_is_asked_about():
    clip = DemoFilm(run.Path("a.mp4"), 0, ((1.0, "3"), (2.5, "4777"), (9.0, "8123")))
    assert run._frame_to_ask_about(clip, 20) == (2.5, "4777")
    assert run._frame_to_ask_about(None, 20) == (5.0, None)
    assert run._frame_to_ask_about(None, None) == (0.0, None)
