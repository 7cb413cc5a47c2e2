"""A soft subtitle track: the captions read back, and the video and sound untouched."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest

from casa.errors import UserError
from casa.media.subtitle_track import add_subtitle_track
from casa.media.subtitles import Caption
from casa.media.video import probe, read_frames

CAPTIONS = [Caption(0.9, 1.5, "zwei\nZeilen, ü"), Caption(0.1, 0.5, "one & <b>"), Caption(5, 6, "after the end")]


def packets(path, kind):
    """(seconds, length, data) of the first stream of a kind."""
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams if s.type == kind)
        return [
            (float(p.pts * p.time_base), float((p.duration or 0) * p.time_base), bytes(p))
            for p in container.demux(stream)
            if p.size
        ]


def texts(path):
    found = []
    for start, length, data in packets(path, "subtitle"):
        if path.suffix != ".mkv":
            assert int.from_bytes(data[:2], "big") == len(data) - 2
            data = data[2:]
        if data:  # MP4 fills the silence between captions with empty ones
            found.append((round(start, 3), round(start + length, 3), data.decode()))
    return found


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "mov_text"), (".m4v", "mov_text"), (".mov", "mov_text"), (".mkv", "srt")]
)
def test_captions_are_read_back_and_the_video_is_the_same(tmp_path, clips, suffix, codec):
    source = clips.write(tmp_path / "in.mp4", range(0, 2000, 100))
    out = tmp_path / f"out{suffix}"
    add_subtitle_track(source, CAPTIONS, out, language="eng")
    with av.open(str(out)) as container:
        assert [s.type for s in container.streams] == ["video", "subtitle"]
        text = container.streams.subtitles[0]
        assert text.codec_context.name in (codec, "subrip" if codec == "srt" else codec)
        assert text.metadata.get("language") == "eng"
        # FFmpeg's own decoder understands them
        spoken = [line.dialogue for p in container.demux(text) if p.size for line in p.decode()]
    assert [line for line in spoken if line.strip()]
    assert texts(out) == [(0.1, 0.5, "one & <b>"), (0.9, 1.5, "zwei\nZeilen, ü"), (5, 6, "after the end")]
    before, after = list(read_frames(source, fps=None)), list(read_frames(out, fps=None))
    assert [f.time for f in after] == pytest.approx([f.time for f in before], abs=2e-3)
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(before, after, strict=True))
    if suffix != ".mkv":
        assert [data for *_, data in packets(out, "video")] == [data for *_, data in packets(source, "video")]
    assert sorted(os.listdir(tmp_path)) == sorted(["in.mp4", out.name])


def test_rotation_and_sound_are_kept(tmp_path, clips):
    source = clips.with_matrix(clips.write(tmp_path / "in.mp4", [0, 100, 200]), 0, 1, -1, 0)
    add_subtitle_track(source, CAPTIONS, tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").rotation == probe(source).rotation == 90

    both = tmp_path / "both.mp4"
    with av.open(str(both), "w") as container:
        video, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=48_000)
        video.width, video.height, video.pix_fmt, sound.layout = 64, 48, "yuv420p", "mono"
        for _ in range(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode())
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 24_000), np.float32), format="fltp", layout="mono")
        wave.rate, wave.pts, wave.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(sound.encode(wave))
        container.mux(sound.encode())
    add_subtitle_track(both, CAPTIONS, both)  # in place
    with av.open(str(both)) as container:
        assert [s.type for s in container.streams] == ["video", "audio", "subtitle"]
    assert len(packets(both, "audio")) > 10


def test_a_clock_that_begins_late(tmp_path, clips):
    """MPEG-TS begins at 1.4 s or so; captions count from where the video begins."""
    source = clips.write(tmp_path / "a.ts", range(0, 2000, 100), format="mpegts")
    for suffix in ("mp4", "mkv"):
        out = tmp_path / f"out.{suffix}"
        add_subtitle_track(source, CAPTIONS[:2], out)
        begin = packets(out, "video")[0][0]
        assert [round(start - begin, 2) for start, _, _ in texts(out)] == [0.1, 0.9]


def test_no_captions_and_very_long_ones(tmp_path, clips):
    source = clips.write(tmp_path / "in.mp4", [0, 100])
    add_subtitle_track(source, [], tmp_path / "none.mp4")
    assert texts(tmp_path / "none.mp4") == []
    add_subtitle_track(source, [Caption(0, 1, "é" * 40_000)], tmp_path / "long.mp4")
    assert texts(tmp_path / "long.mp4")[0][2] == "é" * 32_767


def test_what_cannot_be_done_leaves_nothing(tmp_path, clips):
    source = clips.write(tmp_path / "in.mp4", [0, 100])
    odd = clips.write(tmp_path / "odd.avi", [0, 1], clock=25, codec="huffyuv", pixels="yuv422p")
    for given, out, sentence in (
        (source, "a.avi", r"no video name: let it end in \.mp4"),
        (tmp_path / "missing.mp4", "a.mp4", "There is no file"),
        (source, "no/a.mp4", "does not exist"),
        (odd, "a.mp4", r"cannot hold what is in .*odd\.avi .*: no other can either, so convert the video, or draw"),
    ):
        with pytest.raises(UserError, match=sentence):
            add_subtitle_track(given, CAPTIONS, tmp_path / out)
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "odd.avi"]
