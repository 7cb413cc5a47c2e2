"""Video through a pipe: whatever container FFmpeg reads without seeking (MPEG-TS, Matroska, fragmented MP4, MJPEG).

ffmpeg -i ... -f matroska - | casa caption -
"""

import os
import select
import stat
import sys
import threading
from collections.abc import Generator
from io import BytesIO
from typing import BinaryIO

from casa.errors import UserError
from casa.media.decoder import ReadableFile, VideoDecoder, sampled
from casa.media.pictures import MAX_BYTES
from casa.media.source import Frame, VideoSource, check_fps
from casa.media.video import Pages, is_pages

# How often, in seconds, a reader that waits for data looks whether it is still wanted.
GLANCE = 0.1


class PipeSource(VideoSource):
    """Frames of a video that comes through a pipe.

    Args:
        file: "-" for standard input, the path of a named pipe, or an object with `read`.
        fps: Frames looked at per second.
        live: Whether what is piped in is a live stream: a frame is then given when it comes, without waiting for the
            next one.

    Raises:
        UserError: Nothing is piped in, or nothing that can be read front to back (which may show at the end).
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryIO, fps: float = 2.0, *, live: bool = False) -> None:
        check_fps(fps)
        name = "standard input" if file == "-" else str(getattr(file, "name", file))
        super().__init__(name, live)
        self._fps = fps
        self._pipe = _Pipe(file, self._stopping)
        self._sentence = (
            f"What comes through {name} is no video that can be read from a pipe: "
            "send MPEG-TS, Matroska, fragmented MP4 or MJPEG."
        )
        try:
            self._decoder = self._opened(name)
        except BaseException:
            self._pipe.close()
            raise
        self.describe = f"{name}: {self._decoder.summary}"

    def _opened(self, name: str) -> VideoDecoder | Pages:
        if is_pages(self._pipe.peek(32)):
            # Pillow reads it, and wants the whole of it
            return Pages(BytesIO(self._pipe.rest(MAX_BYTES)), self.counts, name)
        # the whitelist: a playlist that is piped in must reach neither files nor the network
        options = {"protocol_whitelist": "data"}
        return VideoDecoder(self._pipe, name, self._sentence, self.counts, options=options, live=self.is_live)

    def _free(self) -> None:
        self._decoder.close()
        self._pipe.close()

    def _read(self) -> Generator[Frame, None, None]:
        decoder = self._decoder
        yield from sampled(decoder.frames(), self._fps, lambda: decoder.aspect, self.is_live, self.counts)
        if not self.counts.decoded and not self._stopping.is_set():
            # plain MP4 opens, but its packets lie before the index that tells where they are
            raise UserError(self._sentence)


class _Pipe:
    """`read` for PyAV, that gives up waiting when it is no longer wanted."""

    name = "pipe"

    def __init__(self, file: str | os.PathLike[str] | BinaryIO, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._descriptor: int | None = None
        self._is_ours = False
        self._file: ReadableFile = BytesIO()
        self._held = b""
        if file == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise UserError("Nothing is piped in: write ffmpeg ... -f matroska - | casa caption -")
            self._descriptor = sys.stdin.fileno()
        elif isinstance(file, (str, os.PathLike)):
            try:
                self._descriptor = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{file} cannot be read ({error.strerror}): check its name.") from error
            self._is_ours = True
        else:
            self._file = file

    def peek(self, size: int) -> bytes:
        """The next bytes, `size` if there are as many, which `read` gives again."""
        while len(self._held) < size and (more := self._next(size - len(self._held))):
            self._held += more
        return self._held

    def rest(self, most: int) -> bytes:
        """All that comes, at most so many bytes. Raises UserError for more."""
        whole = bytearray()
        while more := self.read(1 << 20):
            whole += more
            if len(whole) > most:
                raise UserError(f"More than {most // 2**20} MiB of pictures are piped in: save them to a file first.")
        return bytes(whole)

    def read(self, size: int) -> bytes:
        if self._held:
            piece, self._held = self._held[:size], self._held[size:]
            return piece
        return self._next(size)

    def _next(self, size: int) -> bytes:
        while not self._stopping.is_set():
            if self._descriptor is None:
                return self._file.read(size)
            if _is_ready(self._descriptor):
                return os.read(self._descriptor, size)
        return b""

    def close(self) -> None:
        """Closes what was opened here: never standard input, nor a caller's own file."""
        if self._is_ours and self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _is_ready(descriptor: int) -> bool:
    """Whether there is something to read, or the end, after waiting for a glance."""
    if not hasattr(select, "poll"):  # Windows: a read waits for data, however long
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(GLANCE * 1000))


def is_pipe(path: str | os.PathLike[str]) -> bool:
    """Whether there is a named pipe at `path`."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
