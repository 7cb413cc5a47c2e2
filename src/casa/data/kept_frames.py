"""Frames of videos in a folder: a video that comes again, in a later epoch or another run, is not decoded again.

    <key>.npz      frames: PNG files one after the other; lengths: of each; times: seconds

The key stands for the file (path, time, size), what is looked at and how: a file written anew is another video.
"""

import os
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from casa.data.frames import VERSION, video_frames
from casa.data.record import Picture
from casa.kept_files import KeptFiles


class KeptFrames:
    """Called like `video_frames`, it gives the same. Raises UserError if the folder cannot be made.

    found, decoded: how often frames were at hand, and how often they were not.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._files = KeptFiles(folder, ".npz", "frames", "keep_frames")
        self.found = self.decoded = 0

    def __call__(self, path: Path, *how: Any) -> list[Picture]:
        """Raises BadRecord as `video_frames` does; what is wrong with a video is not kept."""
        # before it is opened: a video that is replaced meanwhile is not kept under the other's key
        key = _key(path, how)
        pictures = None if key is None else _read(self._files.path(key))
        if pictures is not None:
            self.found += 1
            return pictures
        pictures = video_frames(path, *how)
        self.decoded += 1
        if key is not None:
            self._files.put(key, lambda file: _write(file, pictures))
        return pictures


def _key(path: Path, how: tuple[Any, ...]) -> Any:
    try:
        there = path.stat()
    except OSError:
        # whoever opens it says what is wrong with the file
        return None
    return VERSION, os.path.realpath(path), there.st_mtime_ns, there.st_size, *how


def _write(file: Path, pictures: list[Picture]) -> None:
    frames = [picture.source for picture in pictures if isinstance(picture.source, bytes)]
    with open(file, "wb") as out:
        np.savez(
            out,
            frames=np.frombuffer(b"".join(frames), dtype=np.uint8),
            lengths=np.array([len(frame) for frame in frames], dtype=np.int64),
            times=np.array([picture.time for picture in pictures], dtype=np.float64),
        )


def _read(file: Path) -> list[Picture] | None:
    """None for what is not there or not whole."""
    try:
        with open(file, "rb") as opened, np.load(opened) as held:
            frames, lengths, times = held["frames"].tobytes(), held["lengths"].tolist(), held["times"].tolist()
    # over a damaged file, zipfile and numpy raise what they like
    except Exception:
        return None
    bounds = list(accumulate(lengths, initial=0))
    if len(lengths) != len(times) or bounds[-1] != len(frames) or not lengths:
        return None
    return [Picture(frames[begin:end], time) for (begin, end), time in zip(pairwise(bounds), times, strict=True)]
