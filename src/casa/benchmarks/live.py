"""A live stream by the real clock: frames come at their time, whether the session is ready or not.

What is watched is a film of handwriting, decoded again and again while it is watched, as a camera's stream would be.
Lag is from when a frame was due to when its caption was there, so whatever falls behind (decoding, encoding, the
words) shows in it, or as dropped frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count as counting
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.evaluation.seeds import generator
from casa.evaluation.stream import stream
from casa.media import VideoWriter, read_frames
from casa.memory import resident_bytes
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import Count, FrameCaption, StreamingSession, watch_live

LAP = 60.0  # s of film, which then begins again
CAMERA_FPS = 10.0


@dataclass(frozen=True)
class Seen:
    """A frame as `watch_live` takes it; time in seconds over all laps."""

    image: Image.Image
    time: float


@dataclass(frozen=True)
class Minute:
    """frames: due in this minute. watched, dropped, cut, said: of these. lag: of the watched, in ms.

    took_ms: of finding the words, median. cache_bytes, resident_bytes: of the session and the process, at its end.
    """

    minute: int
    frames: int
    watched: int
    dropped: int
    cut: int
    said: int
    median_lag_ms: float
    max_lag_ms: float
    took_ms: float
    cache_bytes: int
    resident_bytes: int


def laps(path: Path, fps: float, seconds: float, lap: float) -> Iterator[Seen]:
    """The film over and over, sampled at `fps`, until `seconds` are over."""
    for number in counting():
        with read_frames(path, fps=fps) as film:
            for frame in film:
                time = number * lap + frame.time
                if time >= seconds - 1e-6:
                    return
                yield Seen(frame.image, time)


def draw_film(path: Path, size: int, seconds: float, seed: int) -> None:
    """A film of numbers that come and go, `size` x `size` px, `CAMERA_FPS` frames a second."""
    drawn = stream(generator("stream", "held_out", seed), "held_out", seconds=seconds, sizes=[(size, size)])
    with VideoWriter(path, (size, size), CAMERA_FPS) as video:
        for picture in drawn.frames(CAMERA_FPS):
            video.write(picture)


def bench_live(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    minutes: float = 10.0,
    size: int = 448,
    fps: float = 2.0,
    max_text_tokens: int | None = 256,
    seed: int = 0,
    tell: Callable[[Minute], Any] = lambda minute: None,
) -> list[Minute]:
    """Watches for so many minutes, which it takes. tell: called with each minute when it is over.

    Raises UserError for a rate, a length or a size that cannot be.
    """
    if not (math.isfinite(minutes) and minutes > 0 and math.isfinite(fps) and fps > 0):
        raise UserError("minutes and fps are above 0.")
    seconds = 60 * minutes
    lap = min(LAP, max(2.0, math.ceil(seconds)))
    session = StreamingSession(model, processor, max_text_tokens=max_text_tokens, max_new_tokens=16)
    with TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        draw_film(film, size, lap, seed)
        # what is slow the first time only (codec, kernels) is no part of watching
        session.step(next(laps(film, fps, seconds, lap)).image)
        count = Count()
        moments = watch_live(session, laps(film, fps, seconds, lap), fps, count=count, in_real_time=True)
        found = []
        for minute in by_minute(moments, fps, seconds, lambda: (session.usage.cache_bytes, resident_bytes())):
            found.append(minute)
            tell(minute)
    return found


def by_minute(
    moments: Iterable[FrameCaption], fps: float, seconds: float, held: Callable[[], tuple[int, int]]
) -> Iterator[Minute]:
    """Rows of the moments, one for each minute of the stream; a minute of which nothing was watched has a row too.

    held: bytes of the cache and of the process, now.
    """
    minute, part = 0, []
    last = math.ceil(seconds / 60 - 1e-9)
    for moment in moments:
        while moment.time >= 60 * (minute + 1) - 1e-6:
            yield _row(minute, part, fps, seconds, held())
            minute, part = minute + 1, []
        part.append(moment)
    while minute < last:
        yield _row(minute, part, fps, seconds, held())
        minute, part = minute + 1, []


def _row(minute: int, part: list[FrameCaption], fps: float, seconds: float, held: tuple[int, int]) -> Minute:
    end = min(60.0 * (minute + 1), seconds)
    due = math.ceil(end * fps - 1e-6) - math.ceil(60 * minute * fps - 1e-6)
    lags = [1000 * moment.lag for moment in part] or [math.nan]
    took = [1000 * moment.took for moment in part] or [math.nan]
    return Minute(
        minute=minute,
        frames=due,
        watched=len(part),
        dropped=due - len(part),
        cut=sum(not moment.complete for moment in part),
        said=sum(bool(moment.text) for moment in part),
        median_lag_ms=round(float(np.median(lags)), 1),
        max_lag_ms=round(max(lags), 1),
        took_ms=round(float(np.median(took)), 1),
        cache_bytes=held[0],
        resident_bytes=held[1],
    )


def live_summary(minutes: list[Minute], fps: float) -> dict[str, Any]:
    """keeps_pace: no frame was dropped, no caption cut, and no minute's median lag above the time between two frames.

    accumulated_lag_ms: of the last minute over the first one. growth_bytes: of the process, from the end of the second
    minute, when all that is made once is there, to that of the last; None where there is no third.
    """
    worst = max(minute.median_lag_ms for minute in minutes)
    dropped, cut = sum(minute.dropped for minute in minutes), sum(minute.cut for minute in minutes)
    return {
        "fps": fps,
        "frames": sum(minute.frames for minute in minutes),
        "dropped": dropped,
        "cut": cut,
        "accumulated_lag_ms": round(minutes[-1].median_lag_ms - minutes[0].median_lag_ms, 1),
        "max_lag_ms": max(minute.max_lag_ms for minute in minutes),
        "growth_bytes": minutes[-1].resident_bytes - minutes[1].resident_bytes if len(minutes) > 2 else None,
        "keeps_pace": bool(dropped == 0 and cut == 0 and worst <= 1000 / fps),
        "minutes": [asdict(minute) for minute in minutes],
    }


def live_table(minutes: list[Minute]) -> str:
    """The minutes as aligned lines."""
    lines = [f"{'minute':>6}{'frames':>8}{'dropped':>9}{'cut':>5}{'lag, median':>14}{'most':>11}{'cache':>13}"]
    for row in minutes:
        lines.append(
            f"{row.minute:6}{row.frames:8}{row.dropped:9}{row.cut:5}{row.median_lag_ms:11.0f} ms"
            f"{row.max_lag_ms:8.0f} ms{row.cache_bytes / 1024:9.0f} KiB"
        )
    return "\n".join(lines)
