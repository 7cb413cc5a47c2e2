"""The decoder on damaged and unusual videos: what is whole is given, what is not is counted."""

import gc
import weakref

import av
import numpy as np
import pytest

from casa.media.decoder import VideoDecoder
from casa.media.video import probe, read_frames


@pytest.mark.parametrize("size", [(63, 47), (1, 1), (65, 48), (64, 47)])
def test_odd_sizes(tmp_path, clips, size):
    path = clips.write(tmp_path / "a.mkv", [0, 100, 200], size=size, codec="ffv1", pixels="yuv444p")
    assert (probe(path).width, probe(path).height) == size
    pictures = [f.picture for f in read_frames(path, fps=None)]
    assert [p.shape for p in pictures] == [(size[1], size[0], 3)] * 3
    assert [clips.number(p) for p in pictures] == [0, 1, 2]
    assert all(p.dtype == np.uint8 and p.flags.c_contiguous for p in pictures)


def packets(path):
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def noisy_clip(folder, clips, suffix):
    """40 frames of one picture of noise, one every 0.04 s, a key frame at every tenth."""
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = folder / f"a.{suffix}"
    if suffix == "avi":
        return clips.write(path, range(40), clock=25, codec="mjpeg", pixels="yuvj420p", picture=picture)
    return clips.write(path, range(0, 1600, 40), format="mpegts" if suffix == "ts" else None, picture=picture)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mkv", "ts", "avi"])
def test_flipped_bytes_in_the_middle(tmp_path, clips, suffix):
    """Noise over some packets, the container's own bytes included: the video goes on behind it."""
    path = noisy_clip(tmp_path, clips, suffix)
    data = bytearray(path.read_bytes())
    spots = packets(path)
    begin, end = spots[12][0], spots[14][0]
    noise = np.random.default_rng(1).integers(0, 256, end - begin, dtype=np.uint8)
    data[begin:end] = (np.frombuffer(bytes(data[begin:end]), np.uint8) ^ noise).tobytes()
    path.write_bytes(data)
    frames = read_frames(path, fps=None)
    times = [f.time for f in frames]
    assert times == sorted(set(times))
    assert 15 <= len(times) < 40
    assert times[-1] > 1.4  # the end is reached
    # Matroska finds its next whole packet, and says nothing of those between
    assert suffix == "mkv" or frames.counts.skipped >= 1


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mkv", "ts", "avi"])
def test_flipped_bytes_within_a_picture_are_counted(tmp_path, clips, suffix):
    """The container is whole, so every damaged packet is seen."""
    path = noisy_clip(tmp_path, clips, suffix)
    data = bytearray(path.read_bytes())
    position, size = packets(path)[10]
    for at in range(position + 24, position + size - 8):
        # a transport stream has a head of its own every 188 bytes
        if suffix != "ts" or at % 188 >= 24:
            data[at] ^= 0x5A
    path.write_bytes(data)
    frames = read_frames(path, fps=None)
    times = [f.time for f in frames]
    assert frames.counts.skipped >= 1
    assert times == sorted(set(times))
    assert len(times) < 40
    assert times[-1] > 1.4


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a part of a key frame", "a whole frame"])
def test_a_lost_packet_of_a_transport_stream_is_counted(tmp_path, clips, place):
    """188 bytes that never came, as over a bad line: the stream's own count of its packets tells."""
    path = noisy_clip(tmp_path, clips, "ts")
    assert len(list(whole := read_frames(path, fps=None))) == 40
    assert whole.counts.skipped == 0
    data, spots = path.read_bytes(), packets(path)
    if place == "a whole frame":
        at = next(at for at, size in spots[11:] if size < 150)
    else:
        at, size = spots[10]
        assert size > 10 * 188
        at += 4 * 188
    assert data[at] == 0x47, "a packet begins here"
    path.write_bytes(data[:at] + data[at + 188 :])
    frames = read_frames(path, fps=None)
    times = [f.time for f in frames]
    assert frames.counts.skipped >= 1
    assert times == sorted(set(times))
    assert 36 <= len(times) < 40, "the frames around it are shown"
    assert times[-1] > 1.5


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_cut_off_in_the_middle(tmp_path, clips, suffix):
    """Containers written front to back are read as far as they go."""
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    format = "mpegts" if suffix == "ts" else None
    path = clips.write(tmp_path / f"a.{suffix}", range(0, 1600, 40), format=format, picture=picture)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    times = [f.time for f in read_frames(path, fps=None)]
    assert 5 < len(times) < 30
    assert times == pytest.approx([k * 0.04 for k in range(len(times))], abs=2e-3)


def test_counts_and_ends(tmp_path, clips):
    path = clips.write(tmp_path / "a.mp4", range(0, 400, 40))
    with VideoDecoder.of_file(path) as decoder:
        assert len(list(decoder.frames())) == 10
        assert (decoder.counts.decoded, decoder.counts.skipped, decoder.lost) == (10, 0, False)
        assert decoder.duration == pytest.approx(0.4, abs=0.01)
        assert decoder.size == path.stat().st_size
        assert decoder.timed
        assert decoder.summary == "64 x 48, h264"
    decoder.close()


def test_bare_pictures_have_no_times(tmp_path, clips):
    path = clips.write(tmp_path / "a.mjpeg", range(4), clock=25, codec="mjpeg", pixels="yuvj420p", format="mjpeg")
    with VideoDecoder.of_file(path) as decoder:
        assert not decoder.timed


@pytest.fixture
def no_collector():
    """What is in a circle now stays: Python's collector may be long in coming."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_what_was_read_is_let_go_of_at_once(tmp_path, clips, no_collector):
    """Pixels that wait for the collector add up: tens of MB for every time that a film is opened."""
    path = clips.write(tmp_path / "a.mp4", range(0, 400, 40))
    assert len(list(read_frames(path, fps=None))) == 10
    kept = [one for one in gc.get_objects() if type(one) is av.VideoFrame and one.width == 64]
    assert kept == []
    decoder = VideoDecoder.of_file(path)
    gone = weakref.ref(decoder)
    next(decoder.frames())
    decoder.close()
    del decoder
    assert gone() is None
