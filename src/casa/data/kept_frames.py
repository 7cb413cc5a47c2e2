"""Frames of videos in a folder: a video that comes again, in a later epoch or another run, is not decoded again.

    FOLDER/<two digits>/<span>.npz      frames: PNG files one after the other; lengths: of each; times: seconds

<span> stands for the file (path, time, size), what is looked at and how: a file that was written anew is another video.
Processes may share a folder: each file appears whole. Nothing is ever removed from it.
"""

import hashlib
import logging
import os
import zipfile
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from casa.atomic import replacing
from casa.data.frames import video_frames
from casa.data.record import Picture
from casa.errors import UserError

_log = logging.getLogger(__name__)


class KeptFrames:
    """Called like `video_frames`, it gives the same. Raises UserError if the folder cannot be made.

    found, read: how often frames were at hand, and how often a video was decoded.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        self._writes = True
        self.found = self.read = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}): name another keep_frames.") from error

    def __call__(self, path: Path, *how: Any) -> list[Picture]:
        """Raises BadRecord as `video_frames` does; what is wrong with a video is not kept."""
        try:
            kept = self._file(path, how)
            pictures = _read(kept)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            pictures = None
        if pictures is not None:
            self.found += 1
            return pictures
        pictures = video_frames(path, *how)
        self.read += 1
        if self._writes:
            self._keep(path, how, pictures)
        return pictures

    def _keep(self, path: Path, how: tuple[Any, ...], pictures: list[Picture]) -> None:
        """A folder that takes no more, its disk being full, is only read from then on."""
        frames = [picture.source for picture in pictures if isinstance(picture.source, bytes)]
        try:
            file = self._file(path, how)
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as unfinished, open(unfinished, "wb") as out:
                np.savez(
                    out,
                    frames=np.frombuffer(b"".join(frames), dtype=np.uint8),
                    lengths=np.array([len(frame) for frame in frames], dtype=np.int64),
                    times=np.array([picture.time for picture in pictures], dtype=np.float64),
                )
        except (OSError, UserError) as error:
            self._writes = False
            _log.warning("frames are no longer kept in %s: %s", self._folder, error)

    def _file(self, path: Path, how: tuple[Any, ...]) -> Path:
        there = path.stat()
        key = os.path.realpath(path), there.st_mtime_ns, there.st_size, *how
        name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.npz"


def _read(file: Path) -> list[Picture]:
    """Raises OSError, EOFError, ValueError, KeyError or BadZipFile for what is not there or not whole."""
    with open(file, "rb") as opened, np.load(opened) as held:
        frames, lengths, times = held["frames"].tobytes(), held["lengths"].tolist(), held["times"].tolist()
    bounds = list(accumulate(lengths, initial=0))
    if len(lengths) != len(times) or bounds[-1] != len(frames) or not lengths:
        raise ValueError(f"{file} does not hold what its lengths say.")
    return [Picture(frames[begin:end], time) for (begin, end), time in zip(pairwise(bounds), times, strict=True)]
