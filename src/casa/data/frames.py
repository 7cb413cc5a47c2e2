"""Frames of a video as pictures with times, one decoded at a time and kept as a small PNG.

seconds   0.0   0.5   1.0   1.5 ...      at 2 frames per second
"""

import io
import logging
import math
from pathlib import Path

from PIL import Image

from casa.data.bad import BadRecord
from casa.data.record import Picture
from casa.errors import UserError
from casa.media import read_frames
from casa.media.decoder import import_av

# of what `video_frames` makes of a file: to be raised with every change of it, since kept_frames.py keeps it
VERSION = 2
# More of a clip than this may not be damaged: what is said of the whole would be learned from a part.
MOST_DAMAGE = 0.1

log = logging.getLogger("casa.data")


def video_frames(
    path: Path, fps: float, start: float, end: float | None, side: int, most: int, thin: bool
) -> list[Picture]:
    """The frames on screen at start, start + 1/fps, ... before `end` (seconds), longest side at most `side` px.

    most: frames at most. thin: a longer video is looked at less often, evenly; otherwise it is refused.

    Raises:
        BadRecord: no readable video, one that is damaged or cut off in more than a tenth, no frame in that span, or too
            many of them. Smaller damage is logged.
        UserError: PyAV is not installed, which is no fault of the data.
    """
    import_av()
    try:
        with read_frames(path, fps, start, end) as reader:
            seconds = reader.info.duration if end is None else min(end, reader.info.duration)
        wanted = (seconds - start) * fps
        # what does not say how long it is shows that it is too long when it is read
        if math.isfinite(wanted) and wanted > most:
            if not thin:
                raise _too_long(path, most, fps)
            fps *= most / wanted
        pictures = []
        with read_frames(path, fps, start, end) as reader:
            for frame in reader:
                # what a file says about its length is not always so
                if len(pictures) > most:
                    raise _too_long(path, most, fps)
                pictures.append(Picture(_png(frame.image, side), frame.time))
        counts = reader.counts
    except UserError as error:
        raise BadRecord("unreadable-video", str(error)) from error
    if counts.skipped > MOST_DAMAGE * (counts.skipped + counts.decoded):
        raise BadRecord(
            "damaged-video",
            f"{path} is damaged or cut off ({counts.skipped} packets or frames cannot be read): copy it again.",
        )
    if counts.skipped:
        log.warning("%s: %d damaged packets or frames were passed over", path, counts.skipped)
    if not pictures:
        raise BadRecord("unreadable-video", f"{path} has no frame between {start} and {end} s: mend the times.")
    return pictures[:most]


def _png(image: Image.Image, side: int) -> bytes:
    """Encoded without loss, at the speed of a lightly packed file, since it is read once and soon."""
    longest = max(image.size)
    if longest > side:
        size = tuple(max(1, round(length * side / longest)) for length in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    held = io.BytesIO()
    image.save(held, "PNG", compress_level=1)
    return held.getvalue()


def _too_long(path: Path, most: int, fps: float) -> BadRecord:
    return BadRecord(
        "too-long", f"{path} has more than {most} frames at {fps:g} a second: raise most_frames, or lower fps."
    )
