"""The decoder under every source that FFmpeg reads: one opened video stream, its packets, its clock, upright pictures.

Everything that can be refused is refused when it is opened, as one plain sentence. What is damaged is passed over and
counted. Shapes: H, W pixels.
"""

import math
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.pictures import MAX_PIXELS, as_picture, over_white, resized
from casa.media.sampling import TOLERANCE, as_they_come, on_screen, spans
from casa.media.source import Frame, SourceCounts

if TYPE_CHECKING:  # PyAV is an extra, imported only when a video is opened
    import av
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream

# Bare pictures in a row: such a stream carries no times, only a rate that FFmpeg makes up.
UNTIMED = ("mjpeg", "mpjpeg", "image2pipe", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe")
# A clock that goes back by more than this, in seconds, has been set anew; by less, a frame is out of order.
BACKWARDS = 1.0
# FFmpeg's flag of the formats that can be joined by putting one behind the other.
_JOINED = 0x200
# Formats without times that FFmpeg says of themselves, by a flag of its own; and one that loses count when it seeks.
_NO_TIMES = 0x80
_LOSES_COUNT = ("apng",)
# By how many seconds the place to read from is sought earlier, where the first try went too far.
LEADS = (0.0, 10.0, 60.0)
# A live stream is looked into for one second only before its first frame is given (FFmpeg's custom is five), and its
# rate is not measured: its times are what counts.
HASTE = {"analyzeduration": "1000000", "fpsprobesize": "0"}
# After so many damaged places in a row there is nothing left to find.
PATIENCE = 64
# FFmpeg's numbers of the colour spaces that it converts. Others (BT.2020 of constant luminance, YCgCo, damage) would be
# refused with a traceback: they are shown as what is not marked.
CONVERTED, UNMARKED = (0, 1, 2, 4, 5, 6, 7, 9), 2
# As many kinds of side data as FFmpeg may have learned since PyAV named them.
UNNAMED = 8

# (seconds, a decoded frame, how long it is shown if it is the last)
TimedFrames = Generator[tuple[float, "av.VideoFrame | Image.Image", float], None, None]
# what a key frame is known by: its own time, as it is written, its size and sum
KeyName = tuple[int | None, int, int]
# when it appears, in seconds; and its name
KeyFrame = tuple[float | None, KeyName]


class ReadableFile(Protocol):
    """What PyAV reads a video from."""

    def read(self, size: int, /) -> bytes: ...


def import_av() -> ModuleType:
    """The `av` module. Raises UserError if PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("Reading and writing video needs PyAV: install casa-vlm[video].") from error
    return av


class VideoDecoder:
    """An opened video stream; times are in seconds from where the whole begins, sound included.

    Args:
        where: An address, or an object with `read`.
        name: How sentences call it.
        unreadable: The sentence for what is no video.
        counts: Where frames and damage are counted.
        format: FFmpeg's name, where its own guess is not to be trusted.
        options: FFmpeg's own.
        timeout: Seconds to wait for a connection or for data; None for ever.
        live: Frames are wanted soon: little is read before the first, and none are decoded side by side.

    Attributes:
        keys: A list, for whoever wants to know of key frames: each is put there before it is decoded.
        lost: Whether the stream broke off (a connection, a device) rather than came to its end.
        format: FFmpeg's names of the container, with commas.
        timed: Whether the stream says when its frames appear.
        count: Frames, as the file says; None if it does not.
        codec: FFmpeg's name of how pictures are coded.

    Raises:
        UserError: It cannot be opened, or holds no video that can be shown.
    """

    def __init__(
        self,
        where: str | ReadableFile,
        name: str,
        unreadable: str,
        counts: SourceCounts | None = None,
        *,
        format: str | None = None,
        options: dict[str, str] | None = None,
        timeout: float | None = None,
        live: bool = False,
    ) -> None:
        av = import_av()
        self.name = name
        self.counts = counts if counts is not None else SourceCounts()
        self.lost = self._flushing = False
        self.keys: list[KeyFrame] | None = None
        self._missing = 0
        self._sought: float | None = None
        self._failure, self._damage = av.error.FFmpegError, av.error.InvalidDataError
        given = (HASTE if live else {}) | (options or {})
        # nothing here refers to `self`: in a circle, the codec's frames would wait for Python's collector, tens of MB
        self._open = partial(_opened, where, unreadable, format=format, options=given, timeout=timeout)
        self._container = self._open()
        try:
            self.stream = self._choose(av.stream.Disposition.attached_pic)
            self._check()
            # several frames at once where the codec can: bounded by the number of cores
            self.stream.thread_type = "SLICE" if live else "AUTO"
        except BaseException:
            self._container.close()
            raise
        self.format = self._container.format.name
        self.timed = self.format not in UNTIMED
        self.count = self.stream.frames or None
        context = self.stream.codec_context
        self.codec, self.summary = context.name, f"{context.width} x {context.height}, {context.name}"
        begin = self._container.start_time
        # None: whoever knows no beginning begins with the first frame
        self._begin = begin / av.time_base if begin is not None else None
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        self.rate = float(rate) if rate else 25.0
        aspect = self.stream.sample_aspect_ratio
        # where the stream does not say, or says nonsense, pixels are square
        self.aspect = float(aspect) if aspect and 0.1 <= aspect <= 10 else 1.0
        if self.stream.duration is not None and self.stream.time_base:
            last = (self.stream.start_time or 0) + self.stream.duration
            self.duration = float(last * self.stream.time_base) - self.begin
        elif self._container.duration is not None:
            self.duration = self._container.duration / av.time_base
        else:
            self.duration = self.stream.frames / self.rate if self.stream.frames else math.inf

    @classmethod
    def of_file(
        cls, path: str | os.PathLike[str], counts: SourceCounts | None = None, format: str | None = None
    ) -> "VideoDecoder":
        """Opens a video file; arguments as for the class. Raises UserError for what is none."""
        # "file:" and the whitelist: a name such as "http:x", or a playlist, must never reach the network
        decoder = cls(
            "file:" + os.path.abspath(path),
            str(path),
            f"{path} is no video that can be read, or is damaged or cut off: copy it again or convert it.",
            counts,
            format=format,
            options={"protocol_whitelist": "file"},
        )
        if "mp4" in decoder.format:
            # MP4 tells where every packet lies, so how many a copy that ended early lacks shows before it is read
            there = Path(path).stat().st_size
            entries = getattr(decoder.stream, "index_entries", None) or ()
            decoder._missing = sum(entry.pos + entry.size > there for entry in entries)
        return decoder

    @property
    def begin(self) -> float:
        """What the stream's own clock says at second 0."""
        return self._begin or 0.0

    @property
    def size(self) -> int:
        """Bytes of the whole, 0 where nobody knows."""
        return max(0, int(self._container.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the stream; may be called again."""
        self._container.close()

    def seek(self, time: float) -> None:
        """Goes to the last key frame at or before `time`; where no such place is found, stays at the beginning.

        Raises:
            UserError: The beginning cannot be read again, as of a server that is gone.
        """
        self._sought = None
        has_places = self.timed and self.format not in _LOSES_COUNT and not self._has_flag(_NO_TIMES)
        if has_places and time > 0:
            self._sought = time
            self._seek(time)

    def _has_flag(self, flag: int) -> bool:
        return bool(int(self._container.format.flags) & flag)

    def _seek(self, time: float) -> None:
        target = int((time + self.begin) / float(self.stream.time_base or 1))
        try:
            self._container.seek(target, stream=self.stream, backward=True)
        except self._failure:
            self._begin_again()

    def _begin_again(self) -> None:
        # a failed seek may leave the reader anywhere
        index = self.stream.index
        self._container.close()
        self._container = self._open()
        videos = {stream.index: stream for stream in self._container.streams.video}
        if index not in videos:
            raise UserError(f"{self.name} is damaged: copy or download it again.")
        self.stream = videos[index]
        self._sought = None

    def frames(self) -> TimedFrames:
        """Frames with their times, from the beginning or from where was sought; damaged packets are passed over."""
        for lead in LEADS:
            if (sought := self._sought) is None:
                break
            before = replace(self.counts)
            if lead:
                self._seek(max(0.0, sought - lead))
            timed = self._timed()
            first = next(timed, None)
            if first is not None and first[0] <= sought + TOLERANCE:
                yield first
                del first
                yield from timed
                return
            # some containers without an index go too far: past the last key frame, or to the end
            timed.close()
            del first
            self.counts.decoded, self.counts.skipped = before.decoded, before.skipped
            self._flushing = self.lost = False
        if self._sought is not None:
            self._begin_again()
        yield from self._timed()

    def _timed(self) -> TimedFrames:
        """Frames on one clock: films that were joined, as parts of a broadcast, begin again in the middle."""
        if self.keys is not None or not self._has_flag(_JOINED):
            yield from self._stated()
            return
        last, shift = -math.inf, 0.0
        for time, raw, length in self._stated():
            if time + shift < last - BACKWARDS:
                shift = last + length - time
            last = max(last, time + shift)
            yield time + shift, raw, length

    def _stated(self) -> TimedFrames:
        for count, raw in enumerate(self._decode()):
            # frames flushed after a failure come without a clock: it is the stream's
            tick = raw.time_base or self.stream.time_base
            if self._begin is None and raw.pts is not None and tick:
                self._begin = float(raw.pts * tick)
            time = count / self.rate if raw.pts is None or not tick else float(raw.pts * tick) - self.begin
            length = float(raw.duration * tick) if raw.duration and tick else 1 / self.rate
            yield time, raw, length

    def _decode(self) -> "Iterator[av.VideoFrame]":
        before = self.counts.skipped
        for packet in self._packets():
            # The mark says that something is missing close by. It may stand at the whole frame before the gap, even at
            # a key frame; so it is only counted, and the decoder says which frames can be shown.
            self.counts.skipped += packet.is_corrupt
            if self.keys is not None and packet.is_keyframe and packet.size:
                self.keys.append(self._key(packet))
            try:
                decoded = packet.decode()
            except self._failure:
                self.counts.skipped += 1
                continue
            for raw in decoded:
                # frames that the decoder patched up show smeared rubbish: the one before stays on screen
                if raw.is_corrupt:
                    self.counts.skipped += 1
                else:
                    self.counts.decoded += 1
                    yield raw
        if self._flushing:  # what the decoder still holds when the container has failed
            try:
                for raw in self.stream.decode(None):
                    self.counts.decoded += 1
                    yield raw
            except self._failure:
                self.counts.skipped += 1
        # what lies beyond the end of the file, part of which may have been met
        self.counts.skipped += max(0, self._missing - (self.counts.skipped - before))

    def _key(self, packet: "Packet[VideoStream]") -> KeyFrame:
        tick = packet.time_base or self.stream.time_base
        stated = packet.pts if tick and self.timed else None
        seconds = None if stated is None or not tick else float(stated * tick) - self.begin
        return seconds, (stated, packet.size, zlib.crc32(packet))

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """Packets to the end. Past a damaged place the container is asked again, a few times."""
        failures = 0
        packets = demuxed(self._container, self.stream)
        while True:
            try:
                packet = next(packets, None)
            except self._failure as error:
                failures += 1
                self.lost = not isinstance(error, self._damage)
                self.counts.skipped += not self.lost
                if self.lost or failures > PATIENCE:
                    self._flushing = True
                    return
                packets = demuxed(self._container, self.stream)
                continue
            if packet is None:
                return
            failures = 0
            yield packet

    def _choose(self, attached_picture: int) -> "VideoStream":
        # the cover of a song is a "video" stream too
        streams = [s for s in self._container.streams.video if not s.disposition & attached_picture]
        if streams:
            # an AVIF sequence begins with one picture of it
            return streams[0] if streams[0].frames != 1 else max(streams, key=lambda stream: stream.frames)
        if self._container.streams.audio:
            raise UserError(f"{self.name} holds sound but no video: name a video file.")
        raise UserError(f"{self.name} holds no video: name a video file.")

    def _check(self) -> None:
        codec = self.stream.codec_context
        if codec is None:
            raise UserError(f"{self.name} holds a video of an unknown kind: convert it to MP4 (H.264).")
        if codec.width * codec.height > MAX_PIXELS:
            raise UserError(f"{self.name} is {codec.width} x {codec.height} pixels: make it smaller first.")
        if min(codec.width, codec.height) < 1:
            raise UserError(f"{self.name} has no picture size: it is damaged or cut off, so copy it again.")


def demuxed(container: "InputContainer", streams: "Stream | list[Stream]") -> "Iterator[Packet]":
    """PyAV's packets of these streams (or this one); it stumbles over others that show up late, as in a broadcast."""
    while True:
        try:
            yield from container.demux(streams)
            return
        except IndexError:
            continue


def _opened(
    where: str | ReadableFile, unreadable: str, format: str | None, options: dict[str, str], timeout: float | None
) -> "InputContainer":
    """PyAV's container. Raises UserError, with the sentence `unreadable`, if it cannot be opened."""
    av = import_av()
    try:
        return av.open(where, format=format, options=options, timeout=timeout)
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(unreadable) from error


def upright(raw: "av.VideoFrame | Image.Image", aspect: float) -> tuple[np.ndarray, int]:
    """A decoded frame as people see it.

    Args:
        raw: A frame of PyAV's, or a PIL image.
        aspect: The width of one stored pixel over its height.

    Returns:
        uint8 (H, W, 3) with square pixels, upright; and the degrees clockwise it was turned, as its container says.
    """
    if isinstance(raw, Image.Image):
        return np.array(as_picture(raw)), 0
    if raw.colorspace not in CONVERTED:
        raw.colorspace = UNMARKED
    if raw.color_range not in (0, 1, 2):
        raw.color_range = 0
    # what is not tagged follows custom: BT.709 from 720 lines on, BT.601 below
    unmarked_hd = raw.colorspace == UNMARKED and raw.height >= 720 and raw.format.name.startswith("yuv")
    if any(component.is_alpha for component in raw.format.components):
        picture = np.asarray(over_white(Image.fromarray(raw.to_ndarray(format="rgba"))))
    else:
        picture = raw.to_ndarray(format="rgb24", src_colorspace=1 if unmarked_hd else None)
    if aspect != 1:
        picture = resized(picture, max(1, round(picture.shape[1] * aspect)), picture.shape[0])
    matrix = _display_matrix(raw)
    if matrix is None:
        return np.ascontiguousarray(picture), 0
    # The upper left 2 x 2 of the matrix, as rows: x' = a x + c y and y' = b x + d y, y pointing down.
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, dtype=np.int32)[:5])
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    if swapped:
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    degrees = (90 if a < 0 else 270) if swapped else (180 if d < 0 else 0)
    return np.ascontiguousarray(picture), degrees


def sampled(
    timed: TimedFrames, fps: float, aspect: Callable[[], float], is_live: bool, counts: SourceCounts
) -> Generator[Frame, None, None]:
    """Upright frames, looked at `fps` times a second: when they come, or what is on screen at that moment."""
    chosen = as_they_come(timed, fps) if is_live else on_screen(spans(timed, counts), fps)
    for index, (seconds, raw) in enumerate(chosen):
        yield Frame(upright(raw, aspect())[0], seconds, index)
        del raw  # nothing is kept alive while the next frame is decoded


def _display_matrix(raw: "av.VideoFrame") -> bytes | None:
    """The frame's display matrix, None if it has none.

    Asking a frame for its side data ties it in a circle with them (PyAV keeps both in each other), and megabytes of
    pixels would wait for Python's collector. So a frame of a few pixels is asked, which carries the same data.
    """
    # POINT reads only the pixels that it keeps
    small = raw.reformat(16, 16, "gray", interpolation="POINT")
    try:
        matrix = small.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # FFmpeg makes a matrix of an EXIF orientation, and hands over the EXIF data too, of which PyAV has no name;
        # one such kind hides all the others
        av = import_av()
        first = max(kind.value for kind in av.sidedata.sidedata.Type) + 1
        graph = av.filter.Graph()
        steps = [graph.add_buffer(width=16, height=16, format="gray", time_base=1)]
        steps += [graph.add("sidedata", mode="delete", type=str(kind)) for kind in range(first, first + UNNAMED)]
        graph.link_nodes(*steps, graph.add("buffersink")).configure()
        graph.push(small)
        matrix = graph.pull().side_data.get("DISPLAYMATRIX")
    return None if matrix is None else bytes(matrix)
