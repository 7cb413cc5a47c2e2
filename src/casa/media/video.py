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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.pictures import MAX_PIXELS, open_picture, over_white
from casa.media.pyav import import_av
from casa.media.sniff import looks_like_text, read_head
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

    `width` and `height` are in pixels as shown: upright, with square pixels. `duration` is in seconds;
    `fps` is the average rate; `frames` is None where the file does not say; `rotation` is how many
    degrees clockwise (0, 90, 180, 270) the stored frames are turned to stand upright.
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
        UserError: bad settings, or a file that holds no readable video; before the first frame.
    """
    return FrameReader(path, fps, start, end)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, length, rate and codec of a video (or picture), after decoding its first frame.

    Raises:
        UserError: no such file, a directory, empty, text, sound only, cut off or damaged, too large.
    """
    kind = _sniff(path)
    if kind in _STILLS:
        image = open_picture(path)
        return VideoInfo(image.width, image.height, 1.0, 1.0, 1, 0, kind)
    with _Source(path) as source:
        first = next(source.frames(), None)
        if first is None:
            raise UserError(f"{path} holds no readable frame: it is damaged or cut off, so copy it again.")
        image, rotation = _upright(first[1])
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

    `info` is the `VideoInfo`; `skipped` counts the damaged packets passed over so far. `close()`, or
    leaving it as a context manager, lets go of the file early.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: float | None, start: float, end: float | None
    ) -> None:
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise UserError(f"fps is {fps}: give a number of frames per second above 0.")
        if not (math.isfinite(start) and start >= 0):
            raise UserError(f"start is {start}: give a number of seconds from 0 on.")
        if end is not None and not end > start:
            raise UserError(f"end is {end}: give a number of seconds after start ({start}).")
        self.info = probe(path)
        if start >= self.info.duration:
            raise UserError(f"start is {start}, but {path} lasts {self.info.duration:.2f} s: start earlier.")
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
        if self.info.codec in _STILLS:
            yield Frame(open_picture(self._path), start, 0)
            return
        with _Source(self._path) as source:
            if start > 0:
                source.seek(start)
            timed = self._count(source)
            chosen = _every(timed, start, self._end) if fps is None else _sample(timed, fps, start, self._end)
            for index, (time, raw) in enumerate(chosen):
                image, _ = _upright(raw)
                size = (self.info.width, self.info.height)
                # a stream may change its size on the way; whoever reads it should not have to care
                image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
                yield Frame(image, time, index)
                del image, raw  # nothing is kept alive while the next frame is decoded

    def _count(self, source: "_Source"):
        """(begin, end, raw frame) in order, where a frame ends when the next one begins."""
        held: tuple[float, Any, float] | None = None
        for time, raw, length in source.frames():
            self.skipped = source.skipped
            if held is not None:
                if time <= held[0]:  # out of order: left over from damage
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


class _Source:
    """An opened video stream; times are in seconds from the beginning of the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        av = import_av()
        self.skipped = 0
        self._failure = av.error.FFmpegError
        # "file:" and the whitelist: a name such as "http:x", or a playlist, must never reach the network
        url = "file:" + os.path.abspath(path)
        try:
            self._container = av.open(url, options={"protocol_whitelist": "file"})
        except (self._failure, ValueError) as error:
            raise UserError(
                f"{path} is not a video that can be read, or is damaged or cut off: copy it again or convert it to MP4."
            ) from error
        try:
            self.stream = self._choose(path, av.stream.Disposition.attached_pic)
            self._check(path)
            # several frames at once where the codec can: bounded by the number of cores
            self.stream.thread_type = "AUTO"
        except BaseException:
            self._container.close()
            raise
        begin = self._container.start_time
        self._begin = begin / av.time_base if begin is not None else 0.0
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        self.rate = float(rate) if rate else 25.0
        if self.stream.duration is not None and self.stream.time_base:
            last = (self.stream.start_time or 0) + self.stream.duration
            self.duration = float(last * self.stream.time_base) - self._begin
        elif self._container.duration is not None:
            self.duration = self._container.duration / av.time_base
        else:
            self.duration = self.stream.frames / self.rate if self.stream.frames else math.inf

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def seek(self, time: float) -> None:
        """Go to the last key frame at or before `time`; without an index, stay at the beginning."""
        try:
            target = int((time + self._begin) / float(self.stream.time_base))
            self._container.seek(target, stream=self.stream, backward=True)
        except self._failure:
            self._container.seek(0)

    def frames(self):
        """(time, raw frame, how long it is shown if it is the last), damaged packets passed over."""
        count = 0
        for raw in self._decode():
            time = count / self.rate if raw.pts is None else float(raw.pts * raw.time_base) - self._begin
            length = float(raw.duration * raw.time_base) if raw.duration and raw.time_base else 1 / self.rate
            count += 1
            yield time, raw, length

    def _decode(self):
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except self._failure:
                # the container itself ends in damage: give what the decoder still holds
                self.skipped += 1
                yield from self._flush()
                return
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except self._failure:
                self.skipped += 1
                continue
            for raw in decoded:
                # frames that the decoder patched up show smeared rubbish: the one before stays on screen
                if raw.is_corrupt:
                    self.skipped += 1
                else:
                    yield raw

    def _flush(self):
        try:
            yield from self.stream.decode(None)
        except self._failure:
            self.skipped += 1

    def _choose(self, path: object, attached_picture: Any) -> Any:
        # the cover of a song is a "video" stream too
        streams = [s for s in self._container.streams.video if not s.disposition & attached_picture]
        if streams:
            return streams[0]
        if self._container.streams.audio:
            raise UserError(f"{path} holds sound but no video: name a video file.")
        raise UserError(f"{path} holds no video: name a video file.")

    def _check(self, path: str | os.PathLike[str]) -> None:
        codec = self.stream.codec_context
        if codec is None:
            raise UserError(f"{path} holds a video of an unknown kind: convert it to MP4 (H.264).")
        if codec.width * codec.height > MAX_PIXELS:
            raise UserError(f"{path} is {codec.width} x {codec.height} pixels: make it smaller first.")
        if min(codec.width, codec.height) < 1:
            raise UserError(f"{path} has no picture size: it is damaged or cut off, so copy it again.")
        if "mp4" in self._container.format.name:
            # MP4 tells where every packet lies, so a copy that ended early shows before it is read
            entries = getattr(self.stream, "index_entries", None) or ()
            if max((entry.pos + entry.size for entry in entries), default=0) > Path(path).stat().st_size:
                raise UserError(f"{path} is cut off: copy or download it again.")


def _upright(raw: Any) -> tuple[Image.Image, int]:
    """A decoded frame as a PIL image, mode RGB, square pixels, upright; and the degrees it was turned."""
    # what is not tagged follows custom: BT.709 from 720 lines on, BT.601 below
    unmarked_hd = raw.colorspace == 2 and raw.height >= 720 and raw.format.name.startswith("yuv")
    if any(component.is_alpha for component in raw.format.components):
        image = over_white(Image.fromarray(raw.to_ndarray(format="rgba")))
    else:
        image = Image.fromarray(raw.to_ndarray(format="rgb24", src_colorspace=1 if unmarked_hd else None))
    aspect = _pixel_aspect(raw)
    if aspect != 1:
        wide = (max(1, round(image.width * aspect)), image.height)
        image = image.resize(wide, Image.Resampling.BICUBIC)

    matrix = raw.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image, 0
    # The upper left 2 x 2 of the matrix, as rows: x' = a x + c y and y' = b x + d y, y pointing down.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), dtype=np.int32)[:5])
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    if swapped:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if swapped:
        return image, 90 if a < 0 else 270
    return image, 180 if d < 0 else 0


def _pixel_aspect(raw: Any) -> float:
    """Width of one pixel over its height, 1.0 where the stream does not say or says nonsense."""
    aspect = getattr(raw, "sample_aspect_ratio", None)
    return float(aspect) if aspect and 0.1 <= aspect <= 10 else 1.0


_STILLS = ("png", "jpeg", "webp", "bmp", "tiff", "avif")


def _sniff(path: str | os.PathLike[str]) -> str:
    """The kind of still picture the file is, or "video"; refuses what cannot be either."""
    head = read_head(path, "video")
    if looks_like_text(head):
        raise UserError(f"{path} is a text file, not a video: name a video file.")
    kinds = {
        "png": head.startswith(b"\x89PNG"),
        "jpeg": head.startswith(b"\xff\xd8\xff"),
        "webp": head[:4] == b"RIFF" and head[8:12] == b"WEBP",
        "bmp": head.startswith(b"BM"),
        "tiff": head.startswith((b"II*\0", b"MM\0*")),
        "avif": head[4:12] == b"ftypavif",
    }
    return next((kind for kind, found in kinds.items() if found), "video")
