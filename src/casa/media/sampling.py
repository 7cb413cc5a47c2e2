"""Which frames of a stream are looked at: by their time on screen, whatever the rate at which they come.

    source frames on screen   |--A--|-B-|------C------|-D-|      (variable frame rate)
    sampled at fps            ^       ^       ^       ^
    given                     A       B       C       D          each source frame at most once

A frame of a file is on screen until the next begins, so one is held back to learn that. A live stream cannot wait:
there a frame is given when it comes, if a moment to look has passed since the last one.

`timed` streams are (begin in seconds, raw frame, how long it is shown if it is the last).
"""

import math
from collections.abc import Iterator
from typing import TypeVar

from casa.media.source import SourceCounts

# Matroska rounds every time to a millisecond: a frame that begins this much late is still in time.
TOLERANCE = 1e-3

Raw = TypeVar("Raw")


def spans(timed: Iterator[tuple[float, Raw, float]], counts: SourceCounts) -> Iterator[tuple[float, float, Raw]]:
    """(begin, end, raw frame) in rising order, where a frame ends when the next one begins."""
    held: tuple[float, Raw, float] | None = None
    for time, raw, length in timed:
        if held is not None:
            if time <= held[0]:  # after damage a decoder may give frames out of order
                counts.skipped += 1
                continue
            yield held[0], time, held[1]
        held = (time, raw, length)
    if held is not None:
        yield held[0], held[0] + held[2], held[1]


def every(frames: Iterator[tuple[float, float, Raw]], start: float, end: float) -> Iterator[tuple[float, Raw]]:
    """(time, raw frame) of all that appear in start <= time < end."""
    for begin, _, raw in frames:
        if begin >= end - TOLERANCE:
            return
        if begin >= start - TOLERANCE:
            yield begin, raw


def on_screen(
    frames: Iterator[tuple[float, float, Raw]], fps: float, start: float = 0.0, end: float = math.inf, first: int = 0
) -> Iterator[tuple[float, Raw]]:
    """(time, raw frame): what is on screen at start, start + 1/fps, ...; none is given twice.

    Where nothing is on screen yet, the first frame is given when it appears. `first` is the moment to begin with.
    """
    k = first
    for number, (begin, until, raw) in enumerate(frames):
        if not number and begin > start + k / fps + TOLERANCE:
            k = math.floor((begin - start) * fps)
            time = begin
        else:
            time = start + k / fps
        if time >= end - TOLERANCE:
            return
        if time < until - TOLERANCE:
            yield time, raw
            # the first moment at which this frame is gone
            k = max(k + 1, math.ceil((until - TOLERANCE - start) * fps))


def as_they_come(timed: Iterator[tuple[float, Raw, float]], fps: float) -> Iterator[tuple[float, Raw]]:
    """(begin, raw frame), the first after each multiple of 1/fps, without waiting for the one after it."""
    last = -math.inf
    for begin, raw, _ in timed:
        moment = math.floor((begin + TOLERANCE) * fps)
        if moment > last:
            last = moment
            yield begin, raw
