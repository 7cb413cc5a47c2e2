"""The decoder under every source that FFmpeg reads: one opened video stream, its packets and its clock.

Everything that can be refused is refused when it is opened, as one plain sentence. What is damaged is passed over and
counted; `lost` says that the stream broke off (a connection, a device) rather than came to its end.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from casa.errors import UserError
from casa.media.pictures import MAX_PIXELS
from casa.media.pyav import import_av
from casa.media.sniff import looks_like_text, read_head
from casa.media.source import Counts

# File kinds that Pillow reads, as a video of one frame.
STILLS = ("png", "jpeg", "webp", "bmp", "tiff", "avif")
# Bare pictures in a row: such a stream carries no times, only a rate that FFmpeg makes up.
UNTIMED = ("mjpeg", "mpjpeg", "image2pipe", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe")
# A live stream is looked into for one second only before its first frame is given (FFmpeg's custom is five), and its
# rate is not measured: its times are what counts.
HASTE = {"analyzeduration": "1000000", "fpsprobesize": "0"}
# After so many damaged places in a row there is nothing left to find.
PATIENCE = 64


def sniff(path: str | os.PathLike[str]) -> str:
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


class Decoder:
    """An opened video stream; times are in seconds from its beginning.

    where: what PyAV opens: an address, or an object with `read`. name: how sentences call it. unreadable: the sentence
    for what is no video. format, options: FFmpeg's. timeout: seconds to wait for a connection or for data; None for
    ever. live: frames are wanted soon: little is read before the first, and none are decoded side by side.
    """

    def __init__(
        self,
        where: Any,
        name: str,
        unreadable: str,
        counts: Counts | None = None,
        *,
        format: str | None = None,
        options: dict[str, str] | None = None,
        timeout: float | None = None,
        live: bool = False,
    ) -> None:
        av = import_av()
        self.name = name
        self.counts = counts if counts is not None else Counts()
        self.lost = self._flushing = False
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
        begin = self._container.start_time
        self._begin = begin / av.time_base if begin is not None else 0.0
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        self.rate = float(rate) if rate else 25.0
        aspect = self.stream.sample_aspect_ratio
        # where the stream does not say, or says nonsense, pixels are square
        self.aspect = float(aspect) if aspect and 0.1 <= aspect <= 10 else 1.0
        if self.stream.duration is not None and self.stream.time_base:
            last = (self.stream.start_time or 0) + self.stream.duration
            self.duration = float(last * self.stream.time_base) - self._begin
        elif self._container.duration is not None:
            self.duration = self._container.duration / av.time_base
        else:
            self.duration = self.stream.frames / self.rate if self.stream.frames else math.inf

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], counts: Counts | None = None) -> "Decoder":
        """A video file. Raises UserError for what is none, and for a file that is cut off."""
        # "file:" and the whitelist: a name such as "http:x", or a playlist, must never reach the network
        decoder = cls(
            "file:" + os.path.abspath(path),
            str(path),
            f"{path} is no video that can be read, or is damaged or cut off: copy it again or convert it.",
            counts,
            options={"protocol_whitelist": "file"},
        )
        if "mp4" in decoder.format:
            # MP4 tells where every packet lies, so a copy that ended early shows before it is read
            entries = getattr(decoder.stream, "index_entries", None) or ()
            if max((entry.pos + entry.size for entry in entries), default=0) > Path(path).stat().st_size:
                decoder.close()
                raise UserError(f"{path} is cut off: copy or download it again.")
        return decoder

    @property
    def format(self) -> str:
        """FFmpeg's names of the container, with commas."""
        return self._container.format.name

    @property
    def timed(self) -> bool:
        """Whether the stream says when its frames appear."""
        return self.format not in UNTIMED

    @property
    def size(self) -> int:
        """Bytes of the whole, 0 where nobody knows."""
        return max(0, int(self._container.size))

    @property
    def summary(self) -> str:
        context = self.stream.codec_context
        return f"{context.width} x {context.height}, {context.name}"

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the stream; may be called again."""
        self._container.close()

    def seek(self, time: float) -> None:
        """Go to the last key frame at or before `time`; without an index, stay at the beginning.

        Raises UserError if the beginning cannot be read again, as of a server that is gone.
        """
        target = int((time + self._begin) / float(self.stream.time_base))
        try:
            self._container.seek(target, stream=self.stream, backward=True)
        except self._failure:
            # a failed seek may leave the reader anywhere
            index = self.stream.index
            self._container.close()
            self._container = self._open()
            self.stream = self._container.streams[index]

    def frames(self):
        """(time, raw frame, how long it is shown if it is the last), damaged packets passed over."""
        for count, raw in enumerate(self._decode()):
            # frames flushed after a failure come without a clock: it is the stream's
            tick = raw.time_base or self.stream.time_base
            time = count / self.rate if raw.pts is None or not tick else float(raw.pts * tick) - self._begin
            length = float(raw.duration * tick) if raw.duration and tick else 1 / self.rate
            yield time, raw, length

    def _decode(self):
        for packet in self._packets():
            # The mark says that something is missing close by. It may stand at the whole frame before the gap, even at
            # a key frame; so it is only counted, and the decoder says which frames can be shown.
            self.counts.skipped += packet.is_corrupt
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
        if self._flushing:
            yield from self._flush()

    def _packets(self):
        """Packets to the end. Past a damaged place the container is asked again, a few times."""
        failures = 0
        packets = self._container.demux(self.stream)
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
                packets = self._container.demux(self.stream)
                continue
            if packet is None:
                return
            failures = 0
            yield packet

    def _flush(self):
        """What the decoder still holds when the container has failed."""
        try:
            for raw in self.stream.decode(None):
                self.counts.decoded += 1
                yield raw
        except self._failure:
            self.counts.skipped += 1

    def _choose(self, attached_picture: Any) -> Any:
        # the cover of a song is a "video" stream too
        streams = [s for s in self._container.streams.video if not s.disposition & attached_picture]
        if streams:
            return streams[0]
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


def _opened(where: Any, unreadable: str, **settings: Any) -> Any:
    """PyAV's container. Raises UserError, with the sentence `unreadable`, if it cannot be opened."""
    av = import_av()
    try:
        return av.open(where, **settings)
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(unreadable) from error
