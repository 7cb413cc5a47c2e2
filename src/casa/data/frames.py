"""Frames of a video as pictures with times, one decoded at a time and kept as a small PNG.

seconds   0.0   0.5   1.0   1.5 ...      at 2 frames per second
"""

import io
import logging
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from casa.atomic import DiskCache
from casa.data.record import BadRecord, Picture
from casa.errors import UserError
from casa.media import read_frames
from casa.media.decoder import import_av

# of what `video_frames` makes of a file: to be raised with every change of it, since `CachedFrames` keeps it
VERSION = 3
# More of a clip than this may not be damaged: what is said of the whole would be learned from a part.
MAX_DAMAGE = 0.1

log = logging.getLogger("casa.data")


def video_frames(
    path: Path, fps: float, start: float, end: float | None, max_side: int, max_frames: int, thin: bool
) -> list[Picture]:
    """The frames on screen at start, start + 1/fps, ... before `end` (seconds).

    Args:
        path: The video.
        fps: Frames looked at per second.
        start: Seconds from the video's beginning.
        end: Seconds; None for the video's end.
        max_side: Longest side of a frame in px; larger ones are made smaller.
        max_frames: Of the whole span.
        thin: Look less often at a longer video, evenly, rather than refuse it.

    Raises:
        BadRecord: No readable video, one that is damaged or cut off in more than a tenth, no frame in that span, or too
            many of them. Smaller damage is logged.
        UserError: PyAV is not installed, which is no fault of the data.
    """
    import_av()
    try:
        with read_frames(path, fps, start, end) as reader:
            seconds = reader.info.duration if end is None else min(end, reader.info.duration)
        wanted = (seconds - start) * fps
        # what does not say how long it is shows that it is too long when it is read
        if math.isfinite(wanted) and wanted > max_frames:
            if not thin:
                raise _too_long(path, max_frames, fps)
            fps *= max_frames / wanted
        pictures = []
        with read_frames(path, fps, start, end) as reader:
            for frame in reader:
                # what a file says about its length is not always so
                if len(pictures) > max_frames:
                    raise _too_long(path, max_frames, fps)
                pictures.append(Picture(_png(frame.image, max_side), frame.time))
        counts = reader.counts
    except UserError as error:
        raise BadRecord("unreadable-video", str(error)) from error
    if counts.skipped > MAX_DAMAGE * (counts.skipped + counts.decoded):
        raise BadRecord(
            "damaged-video",
            f"{path} is damaged or cut off ({counts.skipped} packets or frames cannot be read): copy it again.",
        )
    if counts.skipped:
        log.warning("%s: %d damaged packets or frames were passed over", path, counts.skipped)
    if not pictures:
        raise BadRecord("unreadable-video", f"{path} has no frame between {start} and {end} s: mend the times.")
    return pictures[:max_frames]


class CachedFrames:
    """`video_frames` with a folder that keeps its results, for later epochs and other runs.

        <key>.npz      times: seconds; and a PNG file for each

    The key stands for the file (path, time, size), what is looked at and how: a file written anew is another video.

    Attributes:
        found, decoded: How often frames were in the folder, and how often not.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._cache = DiskCache(folder, ".npz", "frames", "keep_frames")
        self.found = self.decoded = 0

    def __call__(
        self, path: Path, fps: float, start: float, end: float | None, max_side: int, max_frames: int, thin: bool
    ) -> list[Picture]:
        """As `video_frames`; what is wrong with a video is not kept."""
        how = fps, start, end, max_side, max_frames, thin
        try:
            # before it is opened: a video that is replaced meanwhile is not kept under the other's key
            there = path.stat()
            key = VERSION, os.path.realpath(path), there.st_mtime_ns, there.st_size, *how
        except OSError:
            # opening it says what is wrong with the file
            key = None
        pictures = None if key is None else _read(self._cache.path(key))
        if pictures is not None:
            self.found += 1
            return pictures
        pictures = video_frames(path, *how)
        self.decoded += 1
        if key is not None:
            self._cache.put(key, lambda file: _write(file, pictures))
        return pictures


def _write(file: Path, pictures: list[Picture]) -> None:
    frames = [np.frombuffer(picture.source, np.uint8) for picture in pictures if isinstance(picture.source, bytes)]
    with open(file, "wb") as out:
        np.savez(out, *frames, times=np.array([picture.time for picture in pictures], dtype=np.float64))


def _read(file: Path) -> list[Picture] | None:
    """None for what is not there or not whole."""
    try:
        with open(file, "rb") as opened, np.load(opened) as held:
            times = held["times"].tolist()
            return [Picture(held[f"arr_{number}"].tobytes(), time) for number, time in enumerate(times)] or None
    # over a damaged file, zipfile and numpy raise what they like
    except Exception:
        return None


def _png(image: Image.Image, max_side: int) -> bytes:
    """Encoded without loss, at the speed of a lightly packed file, since it is read once and soon."""
    longest = max(image.size)
    if longest > max_side:
        width, height = (max(1, round(length * max_side / longest)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    held = io.BytesIO()
    image.save(held, "PNG", compress_level=1)
    return held.getvalue()


def _too_long(path: Path, max_frames: int, fps: float) -> BadRecord:
    return BadRecord(
        "too-long", f"{path} has more than {max_frames} frames at {fps:g} a second: raise max_frames, or lower fps."
    )
