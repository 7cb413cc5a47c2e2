"""Video files in: what a file is by its content, what it says of itself, and its frames, decoded one at a time.

Pictures are films in two ways: one file with many frames (animated WebP, PNG, AVIF; a TIFF of pages), and pictures one
after another in one file, as cameras and `ffmpeg -f image2pipe` write them.
"""

import math
import os
import warnings
from collections.abc import Generator
from itertools import islice
from typing import BinaryIO, Literal, NamedTuple, Self

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.decoder import TimedFrames, VideoDecoder, demuxed, import_av, upright
from casa.media.pictures import FORMATS, as_picture, is_heic, looks_like_text, open_picture, read_head, resized
from casa.media.sampling import TOLERANCE, every, on_screen, spans
from casa.media.source import Frame, SourceCounts, VideoSource, check_fps, check_span

# pictures of which there may be several in a row: how the file begins, Pillow's name, FFmpeg's of the row
_IN_A_ROW = (
    (b"\xff\xd8\xff", "JPEG", "mjpeg"),
    (b"\x89PNG\r\n\x1a\n", "PNG", "png_pipe"),
    (b"RIFF", "WEBP", "webp_pipe"),
    (b"BM", "BMP", "bmp_pipe"),
)
_HEIC_FILMS = (b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
PAGE = 1.0  # s, for which a page of a TIFF is shown, as a single picture is
_REDUCED = 254  # the TIFF tag that says of a page that it shows another one in small


class FileKind(NamedTuple):
    """What a file is.

    Attributes:
        name: Of a picture's format, or "video".
        frames: "one", a picture; "pages", what Pillow reads frame by frame; "many", what FFmpeg does.
        format: FFmpeg's name of it; None: FFmpeg finds out.
    """

    name: str
    frames: Literal["one", "pages", "many"]
    format: str | None = None


def sniff(path: str | os.PathLike[str]) -> FileKind:
    """What kind of picture or film there is at `path`, by its content. Raises UserError for what cannot be either."""
    head = read_head(path, "video")
    if looks_like_text(head):
        raise UserError(f"{path} is a text file, not a video: name a video file.")
    if is_pages(head):
        return FileKind("tiff" if head[:4] != b"RIFF" else "webp", "pages")
    if head[4:12] == b"ftypavif":
        return FileKind("avif", "one")
    if is_heic(head) and head[8:12] not in _HEIC_FILMS:
        return FileKind("heic", "one")
    for begin, name, row in _IN_A_ROW:
        if head.startswith(begin) and (name != "WEBP" or head[8:12] == b"WEBP"):
            one = FileKind(name.lower(), "one")
            try:
                with warnings.catch_warnings(action="ignore"), Image.open(path, formats=[name]) as image:
                    if name == "PNG" and getattr(image, "is_animated", False):
                        return FileKind("apng", "many", "apng")
                    lists_others = image.format == "MPO" or "mp" in image.info
            except Exception:  # reading it as a picture says in a sentence what is wrong
                return one
            return FileKind(one.name, "many", row) if not lists_others and _is_row(path, row) else one
    return FileKind("video", "many")


def is_pages(head: bytes) -> bool:
    """Whether a file that begins so is of many pictures that FFmpeg does not read: a TIFF, or a WebP that moves."""
    moves = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 0x02)
    return moves or head.startswith((b"II*\0", b"MM\0*"))


def _is_row(path: str | os.PathLike[str], format: str) -> bool:
    """Whether a second picture of the same size follows the first, and no preview or the like."""
    av = import_av()
    try:
        with av.open("file:" + os.path.abspath(path), format=format) as file:
            stream = file.streams.video[0]
            packets = list(islice((packet for packet in demuxed(file, stream) if packet.size), 2))
            if len(packets) < 2:
                return False
            sizes = [(frame.width, frame.height) for packet in packets for frame in packet.decode()]
            return sizes[:1] == sizes[1:]
    except (av.error.FFmpegError, IndexError):
        return False


class Pages:
    """The pictures of an animated WebP or of a TIFF, through Pillow, as `VideoDecoder` gives frames.

    Raises:
        UserError: Pillow does not read it.
    """

    aspect = 1.0

    def __init__(self, file: str | os.PathLike[str] | BinaryIO, counts: SourceCounts | None, name: str) -> None:
        self.name, self.counts = name, counts if counts is not None else SourceCounts()
        with warnings.catch_warnings(action="ignore"):
            try:
                self._file = Image.open(file, formats=FORMATS)
                self.count = getattr(self._file, "n_frames", 1)
            except Exception as error:
                raise UserError(f"{name} is damaged or cut off: copy or download it again.") from error
        self.codec = str(self._file.format).lower()
        self.duration = self.count * PAGE if self.codec == "tiff" else sum(self._length(k) for k in range(self.count))
        self.rate = self.count / self.duration if self.duration else 1.0

    def _length(self, page: int) -> float:
        """Seconds for which a page is shown; the file then stands at it."""
        self._file.seek(page)
        if self.codec == "tiff":
            return PAGE
        self._file.load()
        # browsers show for a tenth of a second what would be shown for none
        return self._file.info.get("duration", 0) / 1000 or 0.1

    @property
    def summary(self) -> str:
        return f"{self._file.width} x {self._file.height}, {self.codec}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def seek(self, time: float) -> None:
        """Does nothing: a page may be drawn over the one before, so they are read from the first on."""

    def frames(self) -> TimedFrames:
        """Pictures with their times, damaged ones passed over."""
        time = 0.0
        for k in range(self.count):
            try:
                length = self._length(k)
                if k and getattr(self._file, "tag_v2", {}).get(_REDUCED, 0) & 1:
                    continue
                page = as_picture(self._file.copy(), self.name)
            except (UserError, EOFError, OSError, ValueError, SyntaxError):
                self.counts.skipped += 1
                continue
            self.counts.decoded += 1
            yield time, page, length
            time += length


class VideoInfo(NamedTuple):
    """What a video file says of itself.

    Attributes:
        width: In pixels as shown: upright, with square pixels.
        height: Likewise.
        duration: Seconds; infinite where the file does not say.
        fps: Average rate.
        frames: None where the file does not say.
        rotation: Degrees clockwise (0, 90, 180, 270) by which the stored frames are turned to stand upright.
        codec: FFmpeg's or Pillow's name of it.
    """

    width: int
    height: int
    duration: float
    fps: float
    frames: int | None
    rotation: int
    codec: str


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, length, rate and codec of a video (or picture), after decoding its first frame.

    Raises:
        UserError: There is no such file; it is a directory, empty, text, sound only, cut off, damaged, or too large.
    """
    return _probed(path, sniff(path))


def _probed(path: str | os.PathLike[str], kind: FileKind) -> VideoInfo:
    if kind.frames == "one":
        image = open_picture(path)
        return VideoInfo(image.width, image.height, 1.0, 1.0, 1, 0, kind.name)
    with _opened(path, kind) as decoder:
        first = next(decoder.frames(), None)
        if first is None:
            raise UserError(f"{path} holds no readable frame: it is damaged or cut off, so copy it again.")
        picture, rotation = upright(first[1], decoder.aspect)
        height, width = picture.shape[:2]
        return VideoInfo(width, height, decoder.duration, decoder.rate, decoder.count, rotation, decoder.codec)


def _opened(path: str | os.PathLike[str], kind: FileKind, counts: SourceCounts | None = None) -> VideoDecoder | Pages:
    if kind.frames == "pages":
        return Pages(path, counts, str(path))
    return VideoDecoder.of_file(path, counts, kind.format)


class FileSource(VideoSource):
    """The frames of a video file, as `read_frames` gives them. info: the file's `VideoInfo`."""

    def __init__(
        self, path: str | os.PathLike[str], fps: float | None, start: float, end: float | None, after: float | None
    ) -> None:
        if fps is not None:
            check_fps(fps)
        check_span(start, end, after)
        self._kind = sniff(path)
        self.info = _probed(path, self._kind)
        self._path, self._fps, self._start, self._after = path, fps, start, after
        self._end = math.inf if end is None else end
        super().__init__(f"{path}: {self.info.width} x {self.info.height}, {self.info.codec}")
        self.duration = self.info.duration if math.isfinite(self.info.duration) else None

    def _read(self) -> Generator[Frame, None, None]:
        after = self._after
        if self._kind.frames == "one":
            if after is None:
                yield Frame(np.array(open_picture(self._path)), self._start, 0)
            return
        with _opened(self._path, self._kind, self.counts) as decoder:
            begin = self._start if after is None else after
            decoder.seek(begin)
            shown = spans(decoder.frames(), self.counts)
            if self._fps is None:
                chosen = every(shown, begin, self._end)
            else:
                # after: from the frame on that was given then, so that the next is chosen as it would have been
                first = round((begin - self._start) * self._fps)
                chosen = on_screen(shown, self._fps, self._start, self._end, first)
            started, index = False, 0
            for time, raw in chosen:
                if after is not None and time <= after + TOLERANCE:
                    started = True
                    continue
                # a stream may change its size on the way; whoever reads it should not have to care
                picture = resized(upright(raw, decoder.aspect)[0], self.info.width, self.info.height)
                yield Frame(picture, time, index)
                del picture, raw  # nothing is kept alive while the next frame is decoded
                started, index = True, index + 1
            if not started and self._start > 0:
                # told only now: the length a file claims is not always right
                raise UserError(f"{self._path} is over before start ({self._start} s): start earlier.")


def read_frames(
    path: str | os.PathLike[str],
    fps: float | None = 2.0,
    start: float = 0.0,
    end: float | None = None,
    after: float | None = None,
) -> FileSource:
    """Reads the frames of a video, decoded as they are asked for. A still picture is one frame.

    Time 0 is where the file begins, sound included: a film whose picture comes later has its first frame at its own
    time.

    Args:
        path: The file.
        fps: The video is looked at every 1/fps seconds from `start` on, and the frame on screen at that moment is
            given; one that was given already (a slow or still source) is not given again. None gives every frame that
            appears in start <= time < end.
        start: Seconds.
        end: Seconds.
        after: The time of a frame that these settings give; reading begins with the one that they give next.

    Raises:
        UserError: Settings are bad, or the file holds no readable video, at once; `start` is after the end of the
            video, when the first frame is asked for.
    """
    return FileSource(path, fps, start, end, after)
