"""The demo's film is what its seed says: small, of handwriting that nothing was trained on, one result a seed."""

import json

import numpy as np
import pytest
from PIL import ImageFilter

from casa.demo import shipped_film
from casa.demo.run import FPS, SHIPPED
from casa.errors import UserError
from casa.evaluation.handwriting import FIRST_HELD_OUT
from casa.media import probe, read_frames
from casa.media.video_writer import VideoWriter
from projects.casa_tiny.film import film, scene, truth


def test_the_truth_follows_from_the_seed():
    given = json.loads((SHIPPED / "clip.json").read_text())
    drawn = scene(given["seed"])
    assert given == truth(drawn, given["seed"])
    assert all(glyph.scan >= FIRST_HELD_OUT for number in drawn.numbers for glyph in number.glyphs)
    # every number is wholly there, or gone, at each sampled frame
    times = drawn.times(2)
    assert {number.opacity(time) for number in drawn.numbers for time in times} == {0.0, 1.0}


def test_the_file_is_a_small_h264_minute_of_the_same_size():
    given = json.loads((SHIPPED / "clip.json").read_text())
    info = probe(SHIPPED / "clip.mp4")
    assert (info.codec, info.fps, info.frames, info.rotation) == ("h264", 30.0, 1800, 0)
    assert info.duration == pytest.approx(60.0)
    assert [info.width, info.height] == given["size"]
    assert (SHIPPED / "clip.mp4").stat().st_size <= 1_000_000


def test_what_is_decoded_shows_the_ink_where_it_was_drawn():
    clip = shipped_film()
    drawn = scene(clip.seed)
    with read_frames(clip.path, fps=FPS, end=7.0) as frames:
        for frame in frames:
            grey = frame.image.convert("L").filter(ImageFilter.MedianFilter(3))  # the paper's specks are no ink
            ink = grey.point(lambda value: 255 * (value < 120)).getbbox()
            boxes = [glyph.box for glyph in drawn.glyphs(frame.time)]
            if not boxes:
                assert ink is None
                continue
            assert ink is not None
            wanted = (
                min(b[0] for b in boxes),
                min(b[1] for b in boxes),
                max(b[2] for b in boxes),
                max(b[3] for b in boxes),
            )
            assert ink == pytest.approx(wanted, abs=6)


def test_truth_is_given_by_frame():
    clip = shipped_film()
    time, text = clip.captions[0]
    assert clip.truth([time - 0.5, time, time + 0.5]) == ["", text, ""]
    assert len([text for text in clip.truth([k / 2 for k in range(120)]) if text]) == len(clip.captions)


@pytest.mark.slow
def test_a_film_and_its_truth(tmp_path, monkeypatch):
    told, shown, write = [], [], VideoWriter.write

    def watched(self, image, *args):
        shown.append(np.asarray(image).tobytes())
        write(self, image, *args)

    # what is given to the encoder: x264's bytes for the same frames differ now and then on a busy machine
    monkeypatch.setattr(VideoWriter, "write", watched)
    for name in ("a.mp4", "b.mp4"):
        film(tmp_path / name, seed=3, seconds=2, size=(224, 224), progress=lambda done, of: told.append((done, of)))
    assert shown[:60] == shown[60:]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert told[-1] == (60, 60)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.fps, info.frames) == (224, 224, 30.0, 60)
    clip = shipped_film(tmp_path / "a.mp4")
    assert json.loads((tmp_path / "a.json").read_text())["fps"] == FPS == 2
    assert all(text.isdigit() and 0 <= time < 2 for time, text in clip.captions)
    assert json.loads((tmp_path / "a.json").read_text())["size"] == [224, 224]


def test_nothing_is_left_of_a_film_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        film(tmp_path / "nowhere" / "a.mp4", seed=3, seconds=2, size=(224, 224))
    with pytest.raises(ValueError, match="28"):
        film(tmp_path / "a.mp4", seconds=2, size=(225, 224))
    assert not list(tmp_path.iterdir())
