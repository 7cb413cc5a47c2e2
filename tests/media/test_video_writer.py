"""Video out: what is written can be read, is the same every time, and is there whole or not at all."""

import os
import shutil
from contextlib import contextmanager

import av
import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media.video import probe, read_frames
from casa.media.video_writer import VideoWriter


def picture(k, width=64, height=48):
    """Smooth, so that compression keeps it, and different for each k."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3, y * 4, np.full_like(x, 8 * k)], axis=2).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_round_trip(tmp_path, name):
    with VideoWriter(tmp_path / name, (64, 48), fps=25, crf=5) as video:
        for k in range(20):
            video.write(picture(k) if k % 2 else Image.fromarray(picture(k)))
        assert not (tmp_path / name).exists()
    assert os.listdir(tmp_path) == [name]
    info = probe(tmp_path / name)
    assert (info.width, info.height, info.codec) == (64, 48, "h264")
    assert (info.fps, info.duration) == (pytest.approx(25, rel=0.01), pytest.approx(0.8, abs=2e-3))
    frames = list(read_frames(tmp_path / name, fps=None))
    assert [f.time for f in frames] == pytest.approx([k / 25 for k in range(20)], abs=1e-3)
    for k, frame in enumerate(frames):
        # half the colour resolution costs a little; a wrong colour matrix would cost 10 and more
        assert np.abs(np.asarray(frame.image).astype(int) - picture(k)).mean() < 3


def test_colours_are_those_written(tmp_path):
    for name, colour in {"red": (220, 30, 30), "green": (30, 200, 30), "white": (255, 255, 255)}.items():
        with VideoWriter(tmp_path / f"{name}.mp4", (32, 32), fps=10, crf=1) as video:
            video.write(Image.new("RGB", (32, 32), colour))
        (frame,) = read_frames(tmp_path / f"{name}.mp4")
        assert np.abs(np.asarray(frame.image).astype(int) - colour).max() <= 4


@pytest.mark.parametrize("size", [(63, 47), (1, 1), (33, 32)])
def test_odd_sides_get_a_copy_of_the_last_row_or_column(tmp_path, size):
    pixels = picture(3, *size)
    with VideoWriter(tmp_path / "a.mp4", size, fps=10, crf=1) as video:
        video.write(pixels)
    (frame,) = read_frames(tmp_path / "a.mp4")
    width, height = frame.image.size
    assert (width, height) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    padded = np.pad(pixels, ((0, height - size[1]), (0, width - size[0]), (0, 0)), mode="edge")
    assert np.abs(np.asarray(frame.image).astype(int) - padded).max() < 20


def test_times_of_its_own(tmp_path):
    times = [0, 0.1, 0.45, 0.5, 2.0, 2.1]
    with VideoWriter(tmp_path / "a.mp4", (64, 48), fps=10) as video:
        for k, time in enumerate(times):
            video.write(picture(k), time=time)
    assert [f.time for f in read_frames(tmp_path / "a.mp4", fps=None)] == pytest.approx(times, abs=1e-4)
    assert probe(tmp_path / "a.mp4").duration == pytest.approx(2.2, abs=1e-3)


def test_ntsc_rate_is_exact(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", (32, 32), fps=29.97) as video:
        for k in range(10):
            video.write(picture(k, 32, 32))
    with av.open(str(tmp_path / "a.mp4")) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        assert float(rate) == pytest.approx(30000 / 1001, abs=1e-3)


def test_the_same_bytes_every_time(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, (64, 48), fps=25) as video:
            for k in range(30):
                video.write(picture(k))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("written", [0, 1, 60])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_nothing(tmp_path, written, error):
    def fails():
        with VideoWriter(tmp_path / "a.mp4", (64, 48), fps=25) as video:
            for k in range(written):
                video.write(picture(k % 30))
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fails()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov"])
def test_as_it_goes_it_can_be_read_at_any_moment(tmp_path, name):
    times = [k * 0.5 for k in range(12)]
    with VideoWriter(tmp_path / name, (64, 48), fps=2, as_it_goes=True) as video:
        for k, time in enumerate(times):
            video.write(picture(k), time=time)
            if k in (4, 11):
                # what a kill at this moment would leave
                shutil.copy(tmp_path / name, tmp_path / f"{k}{name}")
    for k in (4, 11):
        frames = list(read_frames(tmp_path / f"{k}{name}", fps=None))
        assert k <= len(frames) <= k + 1, "at most the last one is missing"
        assert [f.time for f in frames] == pytest.approx(times[: len(frames)], abs=1e-3)
        assert np.abs(frames[k - 1].picture.astype(int) - picture(k - 1)).mean() < 6
    frames = list(read_frames(tmp_path / name, fps=None))
    assert [f.time for f in frames] == pytest.approx(times, abs=1e-3)
    assert probe(tmp_path / name).duration == pytest.approx(6.0, abs=1e-2)


def test_as_it_goes_an_exception_leaves_what_was_written(tmp_path):
    def fails():
        with VideoWriter(tmp_path / "a.mkv", (64, 48), fps=25, as_it_goes=True) as video:
            for k in range(10):
                video.write(picture(k))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert os.listdir(tmp_path) == ["a.mkv"]
    assert len(list(read_frames(tmp_path / "a.mkv", fps=None))) == 10


def test_an_exception_leaves_the_old_file(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(ValueError, match="this video takes"), VideoWriter(tmp_path / "a.mp4", (64, 48), 25) as v:
        v.write(picture(0, 32, 32))
    assert (tmp_path / "a.mp4").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_without_frames_there_is_no_file(tmp_path):
    with pytest.raises(UserError, match="No frame was written"), VideoWriter(tmp_path / "a.mp4", (64, 48), 25):
        pass
    assert os.listdir(tmp_path) == []


def test_frames_it_does_not_take(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", (64, 48), fps=25) as video:
        video.write(picture(0), time=1.0)
        for bad in (picture(0, 48, 64), picture(0).astype(float), picture(0)[..., 0]):
            with pytest.raises(ValueError, match="this video takes uint8"):
                video.write(bad, time=2.0)
        with pytest.raises(ValueError, match="not after the last"):
            video.write(picture(0), time=1.0)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        video.write(picture(0))


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("a.mp4", {"fps": 0}, "fps is 0"),
        ("a.mp4", {"fps": float("nan")}, "fps is nan"),
        ("a.mp4", {"size": (0, 4)}, "above 0"),
        ("a.mp4", {"crf": 52}, "crf is 52"),
        ("a.txt", {}, r"is no video name: let it end in \.mp4"),
        ("no/a.mp4", {}, "does not exist"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, name, settings, sentence):
    settings = {"size": (64, 48), "fps": 25, **settings}
    with pytest.raises(UserError, match=sentence), VideoWriter(tmp_path / name, **settings):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    @contextmanager
    def full(path):
        yield "/dev/full"

    monkeypatch.setattr("casa.media.video_writer.replacing", full)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)

    def fill():
        with VideoWriter(tmp_path / "a.mkv", (256, 256), fps=25) as video:
            for k in range(8):
                video.write(np.roll(noise, k * 7))

    with pytest.raises(UserError, match="cannot be written"):
        fill()
