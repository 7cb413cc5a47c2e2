"""`open_source`: whatever the user wrote, as a source of frames. Here are folders, Python iterators and pipes."""

import math
import os
import re
import select
import stat
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.decoder import ReadableFile, VideoDecoder, sampled
from casa.media.pictures import MAX_BYTES, check_picture, open_picture
from casa.media.sampling import TOLERANCE, as_they_come
from casa.media.source import Frame, VideoSource, check_fps, check_span
from casa.media.streams import Backoff, is_address, is_device, open_stream
from casa.media.video import Pages, is_pages, read_frames

if sys.platform == "win32":
    import msvcrt

Picture = Image.Image | np.ndarray
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".jp2", ".ppm", ".pgm", ".pnm"),
)
# How often, in seconds, a reader that waits for data looks whether it is still wanted.
GLANCE = 0.1


def open_source(
    spec: str | os.PathLike[str] | BinaryIO | Iterable[Picture | Frame],
    fps: float = 2.0,
    *,
    start: float = 0.0,
    end: float | None = None,
    after: float | None = None,
    live: bool | None = None,
    timeout: float = 10.0,
    options: dict[str, str] | None = None,
    backoff: Backoff | None = None,
) -> VideoSource:
    """Opens frames with their times, looked at `fps` times a second.

    Args:
        spec: A video file (or a picture: one frame); a directory of pictures; "camera:0", "screen"; an address
            (rtsp://, http://, https:// ...); "-" for what is piped in; a binary file object; any Python iterable of
            pictures or `Frame`s.
        fps: Frames looked at per second.
        start: Second to begin at, of files and directories.
        end: Second to stop at, of files and directories.
        after: Time of the last frame that an earlier run took. Files and directories go on with the one that would
            have been next, all else begins where it begins.
        live: Whether frames come at their own pace; None finds out where it can. For addresses, pipes and iterables.
        timeout: As for `open_stream`.
        options: As for `open_stream`.
        backoff: As for `open_stream`.

    Raises:
        UserError: There is nothing that can be read, or this kind of source does not have such a setting.
        TypeError: A single picture, or something that gives none.
    """
    if not isinstance(spec, (str, os.PathLike)):
        _check_no_part(start, end, "a Python object")
        if isinstance(spec, VideoSource):
            raise TypeError("this is a source already: use it as it is")
        if hasattr(spec, "read"):
            return PipeSource(cast(BinaryIO, spec), fps, live=bool(live))
        if isinstance(spec, (np.ndarray, Image.Image, bytes)) or not hasattr(spec, "__iter__"):
            raise TypeError(f"a {type(spec).__name__} is no source of frames: give an iterable of pictures, or a path")
        return PictureSource(cast(Iterable[Picture | Frame], spec), fps, live=bool(live))
    text = os.fspath(spec)
    if not text:
        raise UserError("The name of the video is empty: name a file, a folder, a camera or an address.")
    path = text[len("file://") :] if text.lower().startswith("file://") else text
    if text == "-" or is_pipe(text):
        _check_no_part(start, end, "a pipe")
        return PipeSource(text, fps, live=bool(live))
    if is_device(text) or is_address(path):
        _check_no_part(start, end, "a camera or screen" if is_device(text) else "an address")
        return open_stream(text, fps, live=live, timeout=timeout, options=options, backoff=backoff)
    if os.path.isdir(path):
        return FolderSource(path, fps, start, end, after)
    return read_frames(path, fps, start, end, after)


def _check_no_part(start: float, end: float | None, kind: str) -> None:
    if start != 0 or end is not None:
        raise UserError(f"start and end are for files and folders: leave them out for {kind}.", field=("start", "end"))


class FolderSource(VideoSource):
    """The pictures of a directory in natural order (frame2 before frame10), one every 1/fps seconds from 0 on.

    Hidden files, folders and files that are not called pictures are passed over. One that is called a picture and is
    none is skipped and counted, and its moment stays empty. Raises UserError if there is no picture.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float = 2.0,
        start: float = 0.0,
        end: float | None = None,
        after: float | None = None,
    ) -> None:
        check_fps(fps)
        check_span(start, end, after)
        try:
            names = os.listdir(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check its name.") from error
        names = [name for name in names if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        if not names:
            raise UserError(f"{path} holds no pictures: name a folder with .png or .jpg files.")
        self.paths = [Path(path) / name for name in sorted(names, key=natural)]
        self._fps, self._start, self._end = fps, start, math.inf if end is None else end
        self._after = -math.inf if after is None else after
        super().__init__(f"{path}: {len(names)} pictures")
        self.duration = len(names) / fps

    def _read(self) -> Generator[Frame, None, None]:
        for k, path in enumerate(self.paths):
            time = k / self._fps
            if time < self._start - TOLERANCE or time <= self._after + TOLERANCE:
                continue
            if time >= self._end - TOLERANCE:
                return
            try:
                picture = np.array(open_picture(path))
            except UserError:
                self.counts.skipped += 1
                continue
            self.counts.decoded += 1
            yield Frame(picture, time, self.counts.decoded - 1)


class PictureSource(VideoSource):
    """What a Python iterator gives: pictures (PIL images, or uint8 (H, W, 3)), one every 1/fps seconds; or `Frame`s.

    `Frame`s have times of their own, which must rise, and are sampled at `fps`. An iterator with a `close` is closed
    with the source. What `check_picture` raises is raised when the picture is reached.
    """

    def __init__(self, pictures: Iterable[Picture | Frame], fps: float = 2.0, *, live: bool = False) -> None:
        check_fps(fps)
        self._pictures, self._fps = iter(pictures), fps
        super().__init__(f"a Python {type(pictures).__name__}", live)

    def _free(self) -> None:
        close = getattr(self._pictures, "close", None)
        if close is not None:
            close()

    def _read(self) -> Generator[Frame, None, None]:
        for index, (time, picture) in enumerate(as_they_come(self._timed(), self._fps)):
            image = check_picture(picture)
            yield Frame(picture if isinstance(picture, np.ndarray) else np.array(image), time, index)

    def _timed(self) -> Iterator[tuple[float, Picture, float]]:
        last = -math.inf
        for k, given in enumerate(self._pictures):
            time, picture = (given.time, given.picture) if isinstance(given, Frame) else (k / self._fps, given)
            if time <= last:
                raise UserError(f"A frame at {time:g} s comes after one at {last:g} s: let the times rise.")
            last = time
            self.counts.decoded += 1
            yield time, picture, 1 / self._fps


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """What to sort names by, so that numbers in them count as numbers; the name itself decides between equals."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


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
            if sys.platform == "win32":
                msvcrt.setmode(self._descriptor, os.O_BINARY)
        elif isinstance(file, (str, os.PathLike)):
            try:
                self._descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
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
