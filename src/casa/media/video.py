"""Video files in: frames decoded one at a time, sampled by presentation time, upright, as RGB pictures.

Host memory holds the decoder's few frames whatever the length of the video. How frames are chosen is in
`sampling.py`. Writing is in `video_writer.py`; `VideoWriter` can be imported from here too.
"""

import math
import os
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from casa.errors import UserError
from casa.media.decoder import Decoder
from casa.media.pages import Pages
from casa.media.pictures import open_picture
from casa.media.sampling import TOLERANCE, every, on_screen, spans
from casa.media.sniff import Kind, sniff
from casa.media.source import Counts, Frame, Source, check_fps, check_span
from casa.media.upright import resized, upright
from casa.media.video_writer import VideoWriter

__all__ = ["Frame", "FrameReader", "VideoInfo", "VideoWriter", "probe", "read_frames"]


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
    path: str | os.PathLike[str],
    fps: float | None = 2.0,
    start: float = 0.0,
    end: float | None = None,
    after: float | None = None,
) -> "FrameReader":
    """The frames of a video, decoded as they are asked for.

    With `fps`, the video is looked at every 1/fps seconds from `start` on, and the frame on screen at
    that moment is given; one that was given already (a slow or still source) is not given again. With
    None, every frame that appears in start <= time < end is given. A still picture is one frame. Time 0 is where the
    file begins, sound included: a film whose picture comes later has its first frame at its own time.

    after: the time of a frame that these settings give; reading begins with the one that they give next.

    Raises:
        UserError: bad settings, or a file that holds no readable video, at once; a `start` after the
            end of the video, when the first frame is asked for.
    """
    return FrameReader(path, fps, start, end, after)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, length, rate and codec of a video (or picture), after decoding its first frame.

    Raises:
        UserError: no such file, a directory, empty, text, sound only, cut off or damaged, too large.
    """
    return _probed(path, sniff(path))


def _probed(path: str | os.PathLike[str], kind: Kind) -> VideoInfo:
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


def _opened(path: str | os.PathLike[str], kind: Kind, counts: Counts | None = None) -> Decoder | Pages:
    return Pages(path, counts) if kind.frames == "pages" else Decoder.of_file(path, counts, kind.format)


class FrameReader(Source):
    """Iterates over the `Frame`s of a file; what `read_frames` returns. `info` is the `VideoInfo`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | None = 2.0,
        start: float = 0.0,
        end: float | None = None,
        after: float | None = None,
    ) -> None:
        if fps is not None:
            check_fps(fps)
        check_span(start, end, after)
        self._kind = sniff(path)
        self.info = _probed(path, self._kind)
        self._path = path
        self._fps, self._start, self._end = fps, start, math.inf if end is None else end
        self._after = after
        super().__init__(f"{path}: {self.info.width} x {self.info.height}, {self.info.codec}")
        self.duration = self.info.duration if math.isfinite(self.info.duration) else None

    @property
    def skipped(self) -> int:
        """Damaged packets and frames so far."""
        return self.counts.skipped

    def _read(self) -> Generator[Frame, None, None]:
        after = self._after
        if self._kind.frames == "one":
            if after is not None:
                return
            yield Frame(np.array(open_picture(self._path)), self._start, 0)
            return
        with _opened(self._path, self._kind, self.counts) as decoder:
            begin = self._start if after is None else after
            if begin > 0:
                decoder.seek(begin)
            shown = spans(decoder.frames(), self.counts)
            if self._fps is None:
                chosen = every(shown, begin, self._end)
            else:
                # after: from the frame on that was given then, so that the next is chosen as it would have been
                first = round((begin - self._start) * self._fps)
                chosen = on_screen(shown, self._fps, self._start, self._end, first)
            started, number = False, 0
            for time, raw in chosen:
                if after is not None and time <= after + TOLERANCE:
                    started = True
                    continue
                # a stream may change its size on the way; whoever reads it should not have to care
                picture = resized(upright(raw, decoder.aspect)[0], self.info.width, self.info.height)
                yield Frame(picture, time, number)
                del picture, raw  # nothing is kept alive while the next frame is decoded
                started, number = True, number + 1
            if not started and self._start > 0:
                # told only now: the length a file claims is not always right
                raise UserError(f"{self._path} is over before start ({self._start} s): start earlier.")
