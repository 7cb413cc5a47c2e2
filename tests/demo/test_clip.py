"""The shipped clip is what its seed says: small, and of handwriting that nothing was trained on."""

import json

import pytest
from PIL import ImageFilter

from casa.demo.clip import SHIPPED, Clip, shipped_clip
from casa.demo.film import scene, truth
from casa.errors import UserError
from casa.evaluation.handwriting import FIRST_HELD_OUT
from casa.media import probe, read_frames


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
    clip = shipped_clip()
    drawn = scene(clip.seed)
    with read_frames(clip.path, fps=clip.fps, end=7.0) as frames:
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
    clip = shipped_clip()
    time, text = clip.captions[0]
    assert clip.truth([time - 0.5, time, time + 0.5]) == ["", text, ""]
    assert len([text for text in clip.truth([k / 2 for k in range(120)]) if text]) == len(clip.captions)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"fps": 2}', '{"fps": 0, "seed": 1, "captions": []}',
     '{"fps": 2, "seed": 1, "captions": [{"time": 1, "text": "7"}, {"time": 1, "text": "8"}]}'],
)  # fmt: skip
def test_a_bad_truth_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="write it again"):
        Clip.read(tmp_path / "a.mp4")


def test_a_missing_truth_is_refused(tmp_path):
    with pytest.raises(UserError, match="must lie there"):
        Clip.read(tmp_path / "a.mp4")
