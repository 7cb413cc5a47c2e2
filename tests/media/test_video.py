"""Video in: sampling by presentation time, upright frames, bounded memory, and a sentence for every bad file."""

import sys
import weakref

import av
import numpy as np
import pytest
from PIL import Image

from casa.errors import UserError
from casa.media import decoder
from casa.media.video import Frame, probe, read_frames


@pytest.fixture(scope="session")
def given(clips):
    """(which frame of the clip, time in seconds) for every frame given."""
    return lambda path, **settings: [(clips.number(f.image), round(f.time, 3)) for f in read_frames(path, **settings)]


@pytest.fixture(scope="module")
def steady(tmp_path_factory, clips):
    """40 frames at 30 per second."""
    return clips.write(tmp_path_factory.mktemp("clips") / "steady.mp4", range(0, 40 * 3000, 3000), clock=90_000)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, clips):
    """Variable frame rate: frames at 0, 0.1, 0.45, 0.5, 2.0 and 2.1 s."""
    return clips.write(tmp_path_factory.mktemp("clips") / "uneven.mp4", [0, 100, 450, 500, 2000, 2100])


def test_probe(steady):
    info = probe(steady)
    assert (info.width, info.height, info.frames, info.rotation, info.codec) == (64, 48, 40, 0, "h264")
    assert info.fps == pytest.approx(30)
    assert info.duration == pytest.approx(40 / 30, abs=1e-3)


def test_every_frame(steady, clips):
    frames = list(read_frames(steady, fps=None))
    assert [clips.number(f.image) for f in frames] == list(range(40))
    assert [f.index for f in frames] == list(range(40))
    assert [f.time for f in frames] == pytest.approx([k / 30 for k in range(40)])
    assert isinstance(frames[0], Frame)
    assert (frames[0].image.mode, frames[0].image.size) == ("RGB", (64, 48))


@pytest.mark.parametrize("rate", [2, 3, 7.5, 10, 24, 29.97])
def test_sampled_frames_are_those_on_screen(steady, rate, given):
    times = [k / rate for k in range(100) if k / rate < 40 / 30 - 1e-3]
    assert given(steady, fps=rate) == [(int(t * 30 + 1e-3 * 30), round(t, 3)) for t in times]


@pytest.mark.parametrize("rate", [30, 31, 60, 1000])
def test_no_frame_is_given_twice(steady, rate, given):
    assert [k for k, _ in given(steady, fps=rate)] == list(range(40))


def test_variable_frame_rate(uneven, given):
    assert given(uneven, fps=None) == [(0, 0), (1, 0.1), (2, 0.45), (3, 0.5), (4, 2), (5, 2.1)]
    # at 1.0 and 1.5 s frame 3 is still on screen: not given again
    assert given(uneven, fps=2) == [(0, 0), (3, 0.5), (4, 2)]
    assert given(uneven, fps=4) == [(0, 0), (1, 0.25), (3, 0.5), (4, 2)]


def test_millisecond_clock_loses_no_frame(tmp_path, given, clips):
    """Matroska rounds 1/30 s to whole milliseconds, now up and now down."""
    path = clips.write(tmp_path / "a.mkv", [round(k * 1000 / 30) for k in range(40)])
    assert [k for k, _ in given(path, fps=30)] == list(range(40))


@pytest.mark.parametrize("start", [0.0, 0.2, 0.7, 1.25])
def test_start_and_end(steady, start, given):
    first = round(start * 30)
    assert [k for k, _ in given(steady, fps=None, start=start)] == list(range(first, 40))
    sampled = given(steady, fps=10, start=start, end=start + 0.21)
    expected = [start, start + 0.1, start + 0.2] if start < 1.2 else [start]
    assert [t for _, t in sampled] == pytest.approx(expected)
    assert [k for k, _ in sampled] == [int(t * 30 + 0.031) for t in expected]
    assert [k for k, _ in given(steady, fps=None, end=0.1)] == [0, 1, 2]


def test_start_between_two_distant_frames(uneven, given):
    # the frame on screen at 1.2 s appeared at 0.5 s; the last one, of 2.1 s, is gone by 2.2 s
    assert given(uneven, fps=2, start=1.2)[0] == (3, 1.2)
    assert given(uneven, fps=2.5, start=1.2)[:2] == [(3, 1.2), (4, 2.0)]


def test_a_clock_that_begins_late(tmp_path, given, clips):
    """MPEG-TS begins at 1.4 s or so: time 0 is where the video begins."""
    path = clips.write(tmp_path / "a.ts", range(0, 20 * 3000, 3000), clock=90_000, format="mpegts")
    assert given(path, fps=10)[:3] == [(0, 0), (3, 0.1), (6, 0.2)]


def test_a_stream_without_container_or_index(tmp_path, clips):
    """It knows no length and cannot seek: it is read from the beginning."""
    path = clips.write(tmp_path / "a.h264", range(20), clock=25, format="h264")
    assert len(list(read_frames(path, fps=None))) == 20
    assert next(read_frames(path, fps=5, start=0.3)).time == 0.3


QUARTERS = {
    # matrix a, b, c, d -> how the stored picture is turned to stand upright, degrees clockwise
    (1, 0, 0, 1): (None, 0),
    (0, 1, -1, 0): (Image.Transpose.ROTATE_270, 90),
    (-1, 0, 0, -1): (Image.Transpose.ROTATE_180, 180),
    (0, -1, 1, 0): (Image.Transpose.ROTATE_90, 270),
    (-1, 0, 0, 1): (Image.Transpose.FLIP_LEFT_RIGHT, 0),  # a front camera's mirror
}


@pytest.mark.parametrize("matrix", QUARTERS)
def test_rotation(tmp_path, matrix, clips):
    stored = np.full((48, 64, 3), 40, np.uint8)
    stored[:24, :32] = (220, 30, 30)
    path = clips.write(tmp_path / "a.mp4", [0, 100], picture=stored)
    turn, degrees = QUARTERS[matrix]
    upright = Image.fromarray(stored) if turn is None else Image.fromarray(stored).transpose(turn)
    if turn is not None:
        clips.with_matrix(path, *matrix)
    info = probe(path)
    assert ((info.width, info.height), info.rotation) == (upright.size, degrees)
    for frame in read_frames(path, fps=None):
        difference = np.abs(np.asarray(frame.image).astype(int) - np.asarray(upright))
        assert difference.mean() < 6


def test_wide_pixels_are_made_square(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48)))))
        container.mux(stream.encode())
    assert (probe(path).width, probe(path).height) == (128, 48)
    assert next(read_frames(path)).image.size == (128, 48)


def test_frames_are_decoded_as_they_are_asked_for(steady):
    """The reader holds none of the pictures it has given."""
    given_so_far = []
    for frame in read_frames(steady, fps=None):
        given_so_far.append(weakref.ref(frame.picture))
        del frame
        # at most the latest, which the generator itself lets go of before it decodes on
        assert all(picture() is None for picture in given_so_far[:-1])
    assert len(given_so_far) == 40


def test_memory_does_not_grow_with_the_video(tmp_path, clips):
    """Decoded frames that are alive at once, in a video of 48: the one given and the one after it."""
    path = clips.write(tmp_path / "long.mp4", range(0, 48 * 40, 40))
    decoded = weakref.WeakSet()
    original = decoder.VideoDecoder._decode

    def watched(self):
        for raw in original(self):
            holder = Holder(raw)
            decoded.add(holder)
            yield holder

    class Holder:
        """A decoded frame that can be weakly referenced."""

        def __init__(self, raw):
            self.raw = raw

        def __getattr__(self, name):
            return getattr(self.raw, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.VideoDecoder, "_decode", watched)
        most = 0
        for _ in read_frames(path, fps=None):
            most = max(most, len(decoded))
    assert 1 <= most <= 3


def test_close_ends_it(steady):
    with read_frames(steady) as frames:
        next(frames)
    assert list(frames) == []


def test_a_still_picture_is_one_frame(tmp_path):
    Image.new("RGBA", (32, 16), (0, 0, 0, 0)).save(tmp_path / "a.png")
    frames = list(read_frames(tmp_path / "a.png"))
    assert [(f.time, f.image.size, f.image.getpixel((0, 0))) for f in frames] == [(0, (32, 16), (255, 255, 255))]
    assert probe(tmp_path / "a.png").codec == "png"


def test_gif(tmp_path, given):
    pictures = [Image.new("L", (16, 16), 10 + 5 * k) for k in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 500, 100, 300])
    assert given(tmp_path / "a.gif", fps=None) == [(0, 0), (1, 0.1), (2, 0.6), (3, 0.7)]
    assert given(tmp_path / "a.gif", fps=2) == [(0, 0), (1, 0.5)]


def test_damage_in_the_middle_is_skipped_and_counted(steady, tmp_path, clips):
    data = bytearray(steady.read_bytes())
    with av.open(str(steady)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    position, size = packets[10]  # a key frame: the frames after it cannot be made good either
    data[position : position + size] = b"\xff" * size
    (tmp_path / "a.mp4").write_bytes(data)
    frames = read_frames(tmp_path / "a.mp4", fps=None)
    assert frames.counts.skipped == 0
    numbers = [clips.number(f.image) for f in frames]
    assert frames.counts.skipped >= 1
    # frames 8 and 9 come out of the decoder late, after frames that refer to the lost one
    assert set(range(8)) | set(range(30, 40)) <= set(numbers)
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fps": 0}, "fps is 0: give"),
        ({"fps": -1}, "fps is -1"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"start": -1}, "start is -1"),
        ({"start": float("nan")}, "start is nan"),
        ({"start": 1, "end": 1}, "end is 1: give"),
        ({"end": float("nan")}, "end is nan"),
    ],
)
def test_settings_that_make_no_sense(steady, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        read_frames(steady, **settings)


@pytest.mark.parametrize("rate", [2, None])
def test_start_after_the_end(steady, rate):
    with pytest.raises(UserError, match=r"over before start \(99 s\): start earlier"):
        next(read_frames(steady, fps=rate, start=99))


def refuse(path, sentence):
    for opened in (probe, read_frames):
        with pytest.raises(UserError, match=sentence) as caught:
            opened(path)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "text.mp4").write_text("This is no video.\n" * 500)
    refuse(tmp_path / "text.mp4", r"text\.mp4 is a text file, not a video: name a video file\.")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    refuse(tmp_path / "list.mp4", "is a text file")
    (tmp_path / "empty.mp4").touch()
    refuse(tmp_path / "empty.mp4", "is empty: copy or download the video again")
    (tmp_path / "junk.mp4").write_bytes(bytes(range(256)) * 40)
    refuse(tmp_path / "junk.mp4", "no video that can be read|holds no")
    refuse(tmp_path / "missing.mp4", "There is no file")
    refuse("http://127.0.0.1:9/a.mp4", "There is no file")
    refuse(tmp_path, "is a directory: name one video file")


def test_sound_is_no_video(tmp_path, clips):
    refuse(clips.sound(tmp_path / "a.mp4"), "holds sound but no video: name a video file")
    refuse(clips.sound(tmp_path / "a.mp3", cover=True), "holds sound but no video")


@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_cut_off_files(steady, tmp_path, part):
    data = steady.read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: int(len(data) * part)])
    refuse(tmp_path / "a.mp4", "cut off")


def test_without_pyav(steady, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"install casa-vlm\[video\]"):
        read_frames(steady)
