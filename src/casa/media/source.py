"""What a source of video is: frames with their times, one after another, wherever they come from.

    with open_source("rtsp://192.168.1.9/stream", fps=2) as source:
        for frame in source:
            frame.picture       # uint8 (H, W, 3), red, green, blue, upright
            frame.time          # seconds, rising

Shapes: H, W pixels.
"""

import math
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image

from casa.errors import UserError


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        picture: uint8 (H, W, 3), RGB, upright, with square pixels.
        time: Seconds from the beginning of the source: when it was sampled, or, where every frame is read, when it
            appears.
        index: Counts the frames given, from 0.
    """

    picture: np.ndarray
    time: float
    index: int

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image, made anew each time."""
        return Image.fromarray(self.picture)


@dataclass
class SourceCounts:
    """What has happened in a source so far.

    Attributes:
        decoded: Frames that came out of the decoder (or pictures read), given or not.
        skipped: Damaged packets, frames and picture files passed over.
        reconnects: Connections made after the first.
    """

    decoded: int = 0
    skipped: int = 0
    reconnects: int = 0


class VideoSource(Iterator[Frame]):
    """Frames in rising time. Each kind of source says in `_read` where they come from.

    `close` may be called from any thread, also while another waits for a frame: that one then ends, and whatever was
    open is let go of.

    Attributes:
        describe: One line for people.
        duration: Seconds of the whole, None where nobody knows.
        is_live: Whether frames come at their own pace, and are lost if nobody takes them.
        counts: What happened so far.
    """

    def __init__(self, describe: str, is_live: bool = False) -> None:
        self.describe = describe
        self.is_live = is_live
        self.duration: float | None = None
        self.counts = SourceCounts()
        self._stopping = threading.Event()
        self._busy = threading.Lock()
        self._frames = self._read()

    def _read(self) -> Generator[Frame, None, None]:
        """The frames; run by one thread at a time, and closed at the end."""
        raise NotImplementedError

    def _free(self) -> None:
        """Lets go of what was opened before the first frame was asked for; may be called again."""

    def __next__(self) -> Frame:
        frame = None
        with self._busy:
            if not self._stopping.is_set():
                frame = next(self._frames)
        # Asked again, the lock given back: whoever closed this meanwhile could not take it, and left the rest to us.
        if frame is None or self._stopping.is_set():
            self.close()
            raise StopIteration
        return frame

    def close(self) -> None:
        """Lets go of everything; further iteration ends at once."""
        self._stopping.set()
        if self._busy.acquire(blocking=False):
            try:
                self._frames.close()
                self._free()
            finally:
                self._busy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_fps(fps: float) -> None:
    """Raises UserError for a rate that is none."""
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps is {fps}: give a number of frames per second above 0.", field="fps")


def check_span(start: float, end: float | None, after: float | None = None) -> None:
    """Raises UserError for a part of a video, in seconds, that cannot be."""
    if after is not None and not (math.isfinite(after) and after >= start):
        raise UserError(f"after is {after}: give a number of seconds from start ({start}) on.")
    if not (math.isfinite(start) and start >= 0):
        raise UserError(f"start is {start}: give a number of seconds from 0 on.", field="start")
    if end is not None and not end > start:
        raise UserError(f"end is {end}: give a number of seconds after start ({start}).", field=("end", "start"))
