"""Captions drawn into videos: seen at their time, and nowhere else."""

import os

import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media import Caption, VideoWriter, burn_captions, probe, read_frames

GREY = (150, 150, 150)


def rows_changed(image, plain=GREY):
    return np.flatnonzero(np.abs(np.asarray(image).astype(int) - plain).max(axis=(1, 2)) > 30)


def write_grey(path, times, size=(96, 64)):
    with VideoWriter(path, size, fps=10) as video:
        for time in times:
            video.write(Image.new("RGB", size, GREY), time=time)
    return path


def test_captions_are_burnt_at_their_time(tmp_path):
    times = [0, 0.1, 0.2, 0.3, 0.35, 0.9, 1.4, 1.5]  # variable frame rate
    source = write_grey(tmp_path / "in.mp4", times)
    told = []
    burn_captions(
        source,
        [Caption(0.9, 1.4, "two"), Caption(0.1, 0.3, "one")],
        tmp_path / "out.mp4",
        progress=lambda done, total: told.append((done, total)),
    )
    frames = list(read_frames(tmp_path / "out.mp4", fps=None))
    assert [f.time for f in frames] == pytest.approx(times, abs=1e-3)
    assert [len(rows_changed(f.image)) > 0 for f in frames] == [t in (0.1, 0.2, 0.9) for t in times]
    assert told == [(k + 1, 8) for k in range(8)]
    before, after = probe(source), probe(tmp_path / "out.mp4")
    assert (after.width, after.height) == (before.width, before.height)
    # the last frame lasts one average frame, here 0.2 s
    assert after.duration == pytest.approx(1.5 + 1 / before.fps, abs=2e-3)
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]


def test_a_rotated_video_is_burnt_upright(tmp_path, clips):
    stored = np.full((48, 64, 3), 40, np.uint8)
    stored[:24, :32] = (220, 30, 30)
    path = clips.with_matrix(clips.write(tmp_path / "in.mp4", [0, 100, 200], picture=stored), 0, 1, -1, 0)
    burn_captions(path, [Caption(0, 1, "hi")], tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height, info.rotation) == (48, 64, 0)
    image = next(read_frames(tmp_path / "out.mp4")).image
    corner = image.getpixel((40, 5))
    assert isinstance(corner, tuple)
    assert corner[0] > 180  # the red corner is now at the upper right
    assert len(rows_changed(image.crop((0, 40, 48, 64)), plain=(40, 40, 40))) > 0


def test_a_folder_of_pictures_becomes_a_video(tmp_path):
    """In the size of the first; a picture that is none leaves its moment to the one before."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, size in enumerate([(96, 64), (48, 32), (96, 64), (96, 64)]):
        Image.new("RGB", size, GREY).save(folder / f"{k}.png")
    (folder / "2.png").write_bytes(b"no picture")
    burn_captions(folder, [Caption(0.25, 0.5, "one")], tmp_path / "a.mp4", fps=4)
    frames = list(read_frames(tmp_path / "a.mp4", fps=None))
    assert [f.time for f in frames] == pytest.approx([0, 0.25, 0.75], abs=1e-3)
    assert [f.picture.shape for f in frames] == [(64, 96, 3)] * 3
    assert [len(rows_changed(f.image)) > 0 for f in frames] == [False, True, False]
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture that can be read"):
        burn_captions(folder, [], tmp_path / "b.mp4")


def test_the_source_may_be_replaced(tmp_path):
    path = write_grey(tmp_path / "a.mp4", [0, 0.1, 0.2])
    burn_captions(path, [Caption(0, 1, "hello")], path)
    assert len(rows_changed(next(read_frames(path)).image)) > 0
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_failure_midway_leaves_nothing(tmp_path):
    source = write_grey(tmp_path / "in.mp4", [0, 0.1, 0.2])

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        burn_captions(source, [], tmp_path / "out.mp4", progress=stop)
    assert os.listdir(tmp_path) == ["in.mp4"]
    with pytest.raises(UserError, match="There is no file"):
        burn_captions(tmp_path / "missing.mp4", [], tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == ["in.mp4"]
