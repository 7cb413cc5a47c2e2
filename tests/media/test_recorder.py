"""Recording what comes only once: frames in time, each with its caption, whatever their size."""

import shutil

import numpy as np
import pytest

from casa.errors import UserError
from casa.media import Frame, Recorder, read_frames


def frames(sizes, level=200):
    return [Frame(np.full((*size, 3), level, np.uint8), k / 2, k) for k, size in enumerate(sizes)]


def test_a_frame_has_what_was_said_of_it(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4", 2)
    for frame in recorder.through(frames([(112, 168)] * 4)):
        if frame.index == 1:
            recorder.say(frame.time, frame.time + 1, "one")
    recorder.close()
    recorder.close()
    feet = [frame.picture[-8:].mean() for frame in read_frames(tmp_path / "a.mp4", fps=None)]
    assert [foot < 150 for foot in feet] == [False, True, True, False]


def test_sizes_may_change_on_the_way_and_times_begin_late(tmp_path):
    recorder = Recorder(tmp_path / "a.mkv", 2)
    given = frames([(56, 84), (28, 42), (84, 56)])
    late = [Frame(frame.picture, frame.time + 7, frame.index) for frame in given]
    assert [frame.index for frame in recorder.through(late)] == [0, 1, 2]
    recorder.close()
    kept = list(read_frames(tmp_path / "a.mkv", fps=None))
    assert [frame.picture.shape for frame in kept] == [(56, 84, 3)] * 3
    assert [frame.time for frame in kept] == pytest.approx([0, 0.5, 1.0], abs=2e-3)


def test_a_picture_that_comes_after_the_sound_is_in_time_with_the_captions(tmp_path):
    """The first is on screen from the beginning on, without the caption that is not said yet."""
    recorder = Recorder(tmp_path / "a.mkv", 2, begin=0.0)
    late = [Frame(frame.picture, frame.time + 1.2, frame.index) for frame in frames([(112, 168)] * 2)]
    for frame in recorder.through(late):
        recorder.say(frame.time, frame.time + 1, "one")
    recorder.close()
    kept = list(read_frames(tmp_path / "a.mkv", fps=None))
    assert [frame.time for frame in kept] == pytest.approx([0, 1.2, 1.7], abs=2e-3)
    assert [frame.picture[-8:].mean() < 150 for frame in kept] == [False, True, True]


def test_frames_after_the_end_are_not_recorded(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4", 2)
    passing = recorder.through(frames([(28, 28)] * 4))
    next(passing)
    recorder.close()
    assert len(list(passing)) == 3
    assert len(list(read_frames(tmp_path / "a.mp4", fps=None))) == 1


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_what_was_recorded_before_a_kill_can_be_read(tmp_path, name):
    recorder = Recorder(tmp_path / name, 2)
    assert len(list(recorder.through(frames([(56, 84)] * 20)))) == 20
    shutil.copy(tmp_path / name, tmp_path / f"killed-{name}")  # the recorder is not closed
    kept = [frame.time for frame in read_frames(tmp_path / f"killed-{name}", fps=None)]
    assert len(kept) >= 18
    assert kept == pytest.approx([k / 2 for k in range(len(kept))], abs=2e-3)
    recorder.close()
    assert len(list(read_frames(tmp_path / name, fps=None))) == 20


def test_a_recording_never_replaces_another(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"recorded yesterday")
    (tmp_path / "a.2.mkv").mkdir()
    recorder = Recorder(tmp_path / "a.mkv", 2)
    assert recorder.place is None
    assert len(list(recorder.through(frames([(28, 28)] * 3)))) == 3
    recorder.close()
    assert recorder.place == tmp_path / "a.3.mkv"
    assert len(list(read_frames(tmp_path / "a.3.mkv", fps=None))) == 3
    assert (tmp_path / "a.mkv").read_bytes() == b"recorded yesterday"


def test_a_folder_that_cannot_be_written(tmp_path):
    recorder = Recorder(tmp_path / "nowhere" / "a.mkv", 2)
    with pytest.raises(UserError, match="write to another folder"):
        list(recorder.through(frames([(28, 28)] * 3)))


def test_without_a_frame_there_is_no_file(tmp_path):
    Recorder(tmp_path / "a.mp4", 2).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "fps"), [("a.avi", 2), ("a.mp4", 0)])
def test_what_cannot_be_is_refused_at_once(tmp_path, name, fps):
    with pytest.raises(UserError):
        Recorder(tmp_path / name, fps)
