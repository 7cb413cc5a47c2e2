"""Small videos for the tests, made with PyAV itself where `VideoWriter` must not be trusted."""

import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def clips():
    """`write`, `with_matrix`, `sound` make clips; `number` tells which frame of a clip a picture is."""
    return SimpleNamespace(write=write_clip, with_matrix=with_matrix, sound=write_sound, number=number)


def shade(k):
    """Frames are told apart by their grey: 10, 15, 20, ... (up to 49 frames)."""
    return 10 + 5 * k


def number(image):
    return round((float(np.asarray(image).mean()) - 10) / 5)


def write_clip(path, ticks, clock=1000, size=(64, 48), codec="libx264", picture=None, format=None, pixels=None):
    """Grey frames that appear at `ticks` / `clock` seconds; `pixels` is FFmpeg's name of how they are stored."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=30, options={"g": "10", "crf": "10"})
        stream.width, stream.height = size
        stream.pix_fmt = pixels or ("yuv420p" if codec.startswith("libx264") else "rgb8")
        stream.codec_context.time_base = Fraction(1, clock)
        for k, tick in enumerate(ticks):
            shown = np.full((size[1], size[0], 3), shade(k), np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def with_matrix(path, a, b, c, d):
    """Patch the display matrix in an MP4's track header: what a phone held sideways writes."""
    data = path.read_bytes()
    unit = 1 << 16
    plain = struct.pack(">9i", unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    at = data.index(plain, data.index(b"tkhd"))
    turned = struct.pack(">9i", a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + turned + data[at + len(plain) :])
    return path


def write_sound(path, cover=False):
    """A second of silence; with `cover`, a picture attached as songs have it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix != ".mp3" else "libmp3lame", rate=48_000)
        stream.layout = "mono"
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
            container.mux(picture.encode())
        silence = np.zeros((1, 48_000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate, frame.pts = 48_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
