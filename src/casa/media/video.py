"""Video in: frames decoded one at a time, sampled by presentation time, upright, as RGB pictures.

    source frames on screen   |--A--|-B-|------C------|-D-|      (variable frame rate)
    sampled at fps            ^       ^       ^       ^
    given                     A       B       C       D          each source frame at most once

Host memory holds the decoder's few frames whatever the length of the video. Writing is in
`video_writer.py`; `VideoWriter` can be imported from here too.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from casa.errors import UserError
from casa.media.pictures import open_picture
from casa.media.video_source import STILLS, Source, sniff, upright
from casa.media.video_writer import VideoWriter

__all__ = ["Frame", "FrameReader", "VideoInfo", "VideoWriter", "probe", "read_frames"]

# Matroska rounds every time to a millisecond: a frame that begins this much late is still in time.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Frame:
    """One picture of a video: RGB, upright.

    `time` is in seconds from the beginning of the video: when it was sampled, or when it appears
    where every frame is read. `index` counts the frames given, from 0.
    """

    image: Image.Image
    time: float
    index: int


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    `width` and `height` are in pixels as shown: upright, with square pixels. `duration` is in seconds,
    infinite where the file does not say; `fps` is the average rate; `frames` is None where the file
    does not say; `rotation` is how many degrees clockwise (0, 90, 180, 270) the stored frames are
    turned to stand upright.
    """

    width: int
    height: int
    duration: float
    fps: float
    frames: int | None
    rotation: int
    codec: str


def read_frames(
    path: str | os.PathLike[str], fps: float | None = 2.0, start: float = 0.0, end: float | None = None
) -> "FrameReader":
    """The frames of a video, decoded as they are asked for.

    With `fps`, the video is looked at every 1/fps seconds from `start` on, and the frame on screen at
    that moment is given; one that was given already (a slow or still source) is not given again. With
    None, every frame that appears in start <= time < end is given. A still picture is one frame.

    Raises:
        UserError: bad settings, or a file that holds no readable video, at once; a `start` after the
            end of the video, when the first frame is asked for.
    """
    return FrameReader(path, fps, start, end)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, length, rate and codec of a video (or picture), after decoding its first frame.

    Raises:
        UserError: no such file, a directory, empty, text, sound only, cut off or damaged, too large.
    """
    kind = sniff(path)
    if kind in STILLS:
        image = open_picture(path)
        return VideoInfo(image.width, image.height, 1.0, 1.0, 1, 0, kind)
    with Source(path) as source:
        first = next(source.frames(), None)
        if first is None:
            raise UserError(f"{path} holds no readable frame: it is damaged or cut off, so copy it again.")
        image, rotation = upright(first[1], source.aspect)
        return VideoInfo(
            image.width,
            image.height,
            source.duration,
            source.rate,
            source.stream.frames or None,
            rotation,
            source.stream.codec_context.name,
        )


class FrameReader(Iterator[Frame]):
    """Iterates over `Frame`s; what `read_frames` returns.

    `info` is the `VideoInfo`; `skipped` counts the damaged packets and frames passed over so far. `close()`, or
    leaving it as a context manager, lets go of the file early.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float | None, start: float, end: float | None) -> None:
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise UserError(f"fps is {fps}: give a number of frames per second above 0.")
        if not (math.isfinite(start) and start >= 0):
            raise UserError(f"start is {start}: give a number of seconds from 0 on.")
        if end is not None and not end > start:
            raise UserError(f"end is {end}: give a number of seconds after start ({start}).")
        self.info = probe(path)
        self.skipped = 0
        self._path = path
        self._end = math.inf if end is None else end
        self._frames = self._read(fps, start)

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """Let go of the file; further iteration ends at once."""
        self._frames.close()

    def __enter__(self) -> "FrameReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, fps: float | None, start: float):
        if self.info.codec in STILLS:
            yield Frame(open_picture(self._path), start, 0)
            return
        with Source(self._path) as source:
            if start > 0:
                source.seek(start)
            timed = self._count(source)
            chosen = _every(timed, start, self._end) if fps is None else _sample(timed, fps, start, self._end)
            started = False
            for index, (time, raw) in enumerate(chosen):
                image, _ = upright(raw, source.aspect)
                size = (self.info.width, self.info.height)
                # a stream may change its size on the way; whoever reads it should not have to care
                image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
                yield Frame(image, time, index)
                del image, raw  # nothing is kept alive while the next frame is decoded
                started = True
            if not started and start > 0:
                # told only now: the length a file claims is not always right
                raise UserError(f"{self._path} is over before start ({start} s): start earlier.")

    def _count(self, source: Source):
        """(begin, end, raw frame) in order, where a frame ends when the next one begins."""
        held: tuple[float, Any, float] | None = None
        for time, raw, length in source.frames():
            self.skipped = source.skipped
            if held is not None:
                if time <= held[0]:  # after damage a decoder may give frames out of order
                    source.skipped += 1
                    continue
                yield held[0], time, held[1]
            held = (time, raw, length)
        self.skipped = source.skipped
        if held is not None:
            yield held[0], held[0] + held[2], held[1]


def _every(frames: Iterator[tuple[float, float, Any]], start: float, end: float):
    for begin, _, raw in frames:
        if begin >= end - TOLERANCE:
            return
        if begin >= start - TOLERANCE:
            yield begin, raw


def _sample(frames: Iterator[tuple[float, float, Any]], fps: float, start: float, end: float):
    k = 0
    for _, until, raw in frames:
        time = start + k / fps
        if time >= end - TOLERANCE:
            return
        # What is on screen before the first frame is the first frame: `begin` is not asked for.
        if time < until - TOLERANCE:
            yield time, raw
            # the first moment at which this frame is gone
            k = max(k + 1, math.ceil((until - TOLERANCE - start) * fps))
