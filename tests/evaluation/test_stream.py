"""Streams: one scene at every frame rate, unambiguous frames, true captions, and a view that never leaves the sheet."""

import itertools

import numpy as np
import pytest

from casa.evaluation.example import CELL
from casa.evaluation.handwriting import FIRST_HELD_OUT
from casa.evaluation.stream import LEAST_ZOOM, Camera, stream, training_clip

SEEDS = range(25)
CAMERAS = [Camera.draw(h, w, np.random.default_rng(seed)) for seed, (h, w) in enumerate([(224, 448), (448, 224)])]


@pytest.fixture(scope="module")
def examples():
    return [stream(seed, split, seconds=16) for seed in SEEDS for split in ("train", "held_out")]


def test_frames_at_two_fps_are_those_of_the_thirty_fps_video():
    example = stream(0, "held_out", seconds=2)
    video = [frame.tobytes() for frame in example.frames(30)]
    assert len(video) == 60
    assert [frame.tobytes() for frame in example.frames(2)] == video[::15]


def test_frames_do_not_depend_on_the_order_they_are_drawn_in():
    a, b = stream(1, "train", seconds=6), stream(1, "train", seconds=6)
    times = a.times(2)
    forwards = [a.frame(t).tobytes() for t in times]
    backwards = [b.frame(t).tobytes() for t in reversed(times)]
    assert forwards == backwards[::-1]


def test_sides_and_lengths(examples):
    for example in examples:
        assert example.height % CELL == example.width % CELL == 0
        assert 224 <= min(example.height, example.width) <= max(example.height, example.width) <= 448
        assert len(example.times(2)) == len(example.captions(2)) == 32
    assert examples[0].frame(0.0).size == (examples[0].width, examples[0].height)


def test_times_reach_up_to_the_end():
    example = stream(0, seconds=2)
    assert example.times(2) == [0, 0.5, 1, 1.5]
    assert len(example.times(29.97)) == 60
    with pytest.raises(ValueError, match="above 0"):
        example.times(0)


def test_every_sampled_frame_shows_a_number_wholly_or_not_at_all(examples):
    for example in examples:
        for t in example.times(2):
            opacities = [number.opacity(t) for number in example.numbers]
            assert set(opacities) <= {0.0, 1.0}
            assert sum(opacities) <= 1


def test_numbers_come_one_after_the_other(examples):
    for example in examples:
        assert {len(number.text) for number in example.numbers} <= {1, 2, 3, 4}
        for number in example.numbers:
            assert 0.7 < number.end - number.start < 3.8
        for a, b in itertools.pairwise(example.numbers):
            assert a.text != b.text
            assert 0 <= b.start - a.end < 2.1


def test_some_numbers_follow_at_once_and_some_after_bare_paper(examples):
    gaps = [b.start - a.end for example in examples for a, b in itertools.pairwise(example.numbers)]
    assert min(gaps) == 0
    assert max(gaps) > 0.5


def test_captions_name_each_number_once_when_it_is_new(examples):
    for example in examples:
        captions = example.captions()
        assert [c for c in captions if c] == [n.text for n in example.numbers]
        for t, caption in zip(example.times(), captions, strict=True):
            if caption:
                number = example.visible(t)
                assert number is not None
                assert number.text == caption
                assert number.start < t < number.start + 0.5


def test_captions_do_not_depend_on_the_frame_rate(examples):
    for example in examples[:6]:
        assert [c for c in example.captions(30) if c] == [n.text for n in example.numbers]


def test_digits_stay_in_view_and_large_enough(examples):
    for example in examples:
        for t in example.times(10):
            boxes = [glyph.box for glyph in example.glyphs(t)]
            for left, top, right, bottom in boxes:
                assert left >= 0
                assert top >= 0
                assert right <= example.width
                assert bottom <= example.height
                assert bottom - top > 19
            for a, b in itertools.pairwise(boxes):
                assert (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2 >= 28


def test_ink_is_where_the_boxes_are(examples):
    for example in examples[:8]:
        for t in example.times()[::5]:
            grey = np.asarray(example.frame(t).convert("L")).astype(float)
            paper = np.median(grey)
            for box in [glyph.box for glyph in example.glyphs(t)]:
                left, top, right, bottom = (round(v) for v in box)
                assert np.percentile(grey[top:bottom, left:right], 10) < paper - 50
            if not [glyph.box for glyph in example.glyphs(t)]:
                assert np.percentile(grey, 0.5) > paper - 60


def test_scans_are_of_the_split():
    for seed in SEEDS:
        for split, held_out in (("train", False), ("held_out", True)):
            for number in stream(seed, split, seconds=4).numbers:
                assert all((glyph.scan >= FIRST_HELD_OUT) == held_out for glyph in number.glyphs)


def test_splits_and_seeds_differ():
    texts = [[n.text for n in stream(seed, split).numbers] for seed in (0, 1) for split in ("train", "held_out")]
    assert all(a != b for a, b in itertools.combinations(texts, 2))


def test_too_short_is_refused():
    with pytest.raises(ValueError, match="2 s or more"):
        stream(0, seconds=1.0)
    with pytest.raises(ValueError, match="2 s or more"):
        stream(0, seconds=float("nan"))


def test_clips_to_train_on_are_mostly_short():
    rng = np.random.default_rng(0)
    lengths = [training_clip(rng).seconds for _ in range(40)]
    assert 3 <= min(lengths) < max(lengths) <= 20
    assert sum(seconds <= 6 for seconds in lengths) > 24


@pytest.mark.parametrize("camera", CAMERAS)
def test_to_frame_undoes_to_sheet(camera):
    for t in (0.0, 1.7, 100.0):
        assert camera.to_frame(*camera.to_sheet(13.0, 200.0, t), t) == pytest.approx((13.0, 200.0))


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_view_stays_on_the_sheet(camera):
    height, width = camera.sheet_size
    for t in np.linspace(0, 60, 601):
        for x in (0, camera.width):
            for y in (0, camera.height):
                sheet_x, sheet_y = camera.to_sheet(x, y, float(t))
                assert 0 <= sheet_x <= width
                assert 0 <= sheet_y <= height
        assert LEAST_ZOOM - 1e-9 <= camera.scale(float(t)) <= 1 / LEAST_ZOOM + 1e-9


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_view_moves_but_never_jumps(camera):
    steps = np.array([camera.to_sheet(0, 0, k / 30) for k in range(900)])
    moves = np.linalg.norm(np.diff(steps, axis=0), axis=1)
    assert moves.max() < 4
    assert np.ptp(steps, axis=0).min() > 5
