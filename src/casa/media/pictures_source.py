"""Pictures in a row as a source: the files of a directory, or whatever a Python iterator gives."""

import math
import os
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.pictures import check_picture, open_picture
from casa.media.sampling import TOLERANCE, as_they_come
from casa.media.source import Frame, Source, check_fps, check_span

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".jp2", ".ppm", ".pgm", ".pnm"),
)


class FolderSource(Source):
    """The pictures of a directory in natural order (frame2 before frame10), one every 1/fps seconds from 0 on.

    Hidden files, folders and files that are not called pictures are passed over; one that is called a picture and is
    none is skipped and counted, and its moment stays empty. start, end: seconds. after: as for `read_frames`.
    Raises UserError if there is no picture in it.
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
        number = 0
        for k, path in enumerate(self.paths):
            seconds = k / self._fps
            if seconds < self._start - TOLERANCE or seconds <= self._after + TOLERANCE:
                continue
            if seconds >= self._end - TOLERANCE:
                return
            try:
                picture = np.array(open_picture(path))
            except UserError:
                self.counts.skipped += 1
                continue
            self.counts.decoded += 1
            yield Frame(picture, seconds, number)
            number += 1


class PictureSource(Source):
    """What a Python iterator gives: pictures (PIL images, or uint8 (H, W, 3)), one every 1/fps seconds; or `Frame`s,
    which have times of their own and are sampled at `fps`.

    live: whether the iterator gives at its own pace. An iterator with a `close` is closed with the source.
    Raises, when the picture is reached, what `casa.media.pictures.check_picture` raises; ValueError if the times of
    frames do not rise.
    """

    def __init__(self, pictures: Iterable[Any], fps: float = 2.0, *, live: bool = False) -> None:
        check_fps(fps)
        self._pictures, self._fps = iter(pictures), fps
        super().__init__(f"a Python {type(pictures).__name__}", live)

    def _free(self) -> None:
        close = getattr(self._pictures, "close", None)
        if close is not None:
            close()

    def _read(self) -> Generator[Frame, None, None]:
        chosen = as_they_come(self._timed(), self._fps)
        for number, (seconds, picture) in enumerate(chosen):
            yield Frame(_array(picture), seconds, number)

    def _timed(self):
        last = -math.inf
        for k, given in enumerate(self._pictures):
            seconds, picture = (given.seconds, given.picture) if isinstance(given, Frame) else (k / self._fps, given)
            if seconds <= last:
                raise UserError(f"A frame at {seconds:g} s comes after one at {last:g} s: let the times rise.")
            last = seconds
            self.counts.decoded += 1
            yield seconds, picture, 1 / self._fps


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """What to sort names by, so that numbers in them count as numbers; the name itself decides between equals."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


def _array(picture: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        check_picture(picture)
        return picture
    return np.array(check_picture(picture))
