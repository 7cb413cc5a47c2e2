"""Captions drawn into what comes only once: a camera, a stream or a pipe is recorded as it is watched.

Shapes: H, W pixels.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from casa.errors import UserError
from casa.media.drawing import draw_caption
from casa.media.source import Frame
from casa.media.subtitles import Caption, tidy
from casa.media.upright import resized
from casa.media.video_writer import VideoWriter


class Recorder:
    """Writes the frames that pass through it, each with the caption that is on screen, as a video.

        recorder = Recorder("seen.mp4", fps=2)
        for frame in recorder.through(source):
            recorder.say(frame.seconds, frame.seconds + 3, text)
        recorder.close()

    A frame is written when the next one comes, so that what was said of it stands in it. `say` and `close` may be
    called from another thread than the one that takes frames. The video, which begins with the first frame, can be
    played as far as it got, also after a kill; and it never replaces another: beside `seen.mp4` comes `seen.2.mp4`.
    path, fps: as for `VideoWriter`; fps is the rate at which frames are expected, their own times count. begin: the
    second at which the video begins, None for that of its first frame, which is otherwise on screen from there on.
    place: where the video is; None before its first frame.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, begin: float | None = None) -> None:
        # what cannot be written is refused now, not at the first frame
        VideoWriter(path, (2, 2), fps)
        self._path, self._fps = Path(path), fps
        self.place: Path | None = None
        self._video: VideoWriter | None = None
        self._size = (0, 0)  # W, H
        self._begin = begin
        self._held: Frame | None = None
        self._caption: Caption | None = None
        self._closed = False
        self._lock = threading.Lock()

    def through(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """The frames, recorded on their way."""
        for frame in frames:
            with self._lock:
                self._write()
                self._held = None if self._closed else frame
            yield frame

    def say(self, start: float, end: float, text: str) -> None:
        """As for any writer of captions."""
        said = tidy([Caption(start, end, text)])
        with self._lock:
            self._caption = said[0] if said else self._caption

    def close(self, end: float | None = None) -> None:
        """Writes the last frame and ends the file; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._write()
            finally:
                if self._video is not None:
                    self._video.__exit__(None, None, None)

    def _write(self) -> None:
        frame, self._held = self._held, None
        if frame is None:
            return
        if self._video is None:
            height, width = frame.picture.shape[:2]
            self._size = (width, height)
            self._begin = frame.seconds if self._begin is None else self._begin
            self.place = _new_file(self._path)
            self._video = VideoWriter(self.place, self._size, self._fps, as_it_goes=True).__enter__()
            if frame.seconds > self._begin:
                self._video.write(frame.picture, time=0.0)
        picture, caption = resized(frame.picture, *self._size), self._caption
        if caption is not None and caption.start <= frame.seconds + 1e-3 and frame.seconds < caption.end:
            picture = np.asarray(draw_caption(Frame(picture, frame.seconds, 0).image, caption.text))
        self._video.write(picture, time=frame.seconds - (self._begin or 0.0))


def _new_file(path: Path) -> Path:
    """An empty file at `path`, or, where something is there already, beside it, with a number. Raises UserError."""
    place, number = path, 1
    while True:
        try:
            # O_EXCL: never what somebody else has just put there
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return place
        except FileExistsError:
            number += 1
            place = path.with_stem(f"{path.stem}.{number}")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): write to another folder.") from error
