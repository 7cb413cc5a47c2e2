"""How many live streams one machine sustains: sessions in one batch, each with a new frame every 1 / fps seconds.

The number is looked for by a clock of the streams' own, which the steps move as they are measured: a step that takes
longer than 1 / fps makes the next one late, and a frame that is replaced before its turn is dropped, as it would be
live. What was found is then tried by the real clock, with frames that come as JPEG, each session's at moments of its
own. Drawing the frames is not counted: cameras do that.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from casa.benchmarks.stream import handwriting
from casa.errors import UserError
from casa.media.pictures import picture_from
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import StreamingEngine

WARM = 2  # steps before the clock counts
POLL_SECONDS = 0.001  # between looks at whether a frame has come
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Load:
    """So many sessions: milliseconds of a step over all of them (median, 95th percentile), and whether that keeps up.

    dropped: frames of each session that were replaced before their turn. lag_ms: from a frame's coming to its caption,
    the most, and that of the last frame. bytes: of all sessions' caches at the end.
    """

    sessions: int
    median_ms: float
    p95_ms: float
    dropped: int
    lag_ms: tuple[float, float]
    sustained: bool
    bytes: int


def bench_sessions(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    most: int = 32,
    fps: float = 2.0,
    size: int = 224,
    seconds: float = 10.0,
    max_text_tokens: int | None = 128,
    seed: int = 0,
) -> list[Load]:
    """Loads of 1, 2, 4, ... up to `most` sessions, each watching handwriting of its own for `seconds` of film; behind
    the first that is not sustained, those halfway between it and the last that was. In order of their numbers.

    A load is sustained if no frame is dropped and half of the steps end before the next frames come.
    Raises UserError for a rate, a size or a number that cannot be.
    """
    if most < 1 or not fps > 0 or not seconds > 0:
        raise UserError("most is 1 or more, and fps and seconds are above 0.")
    found: list[Load] = []
    good, bad = 0, most + 1
    while bad - good > 1:
        count = min(max(1, 2 * good), most) if bad > most else (good + bad) // 2
        found.append(_load(model, processor, count, fps, size, seconds, max_text_tokens, seed))
        good, bad = (count, bad) if found[-1].sustained else (good, count)
    return sorted(found, key=lambda load: load.sessions)


def _load(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    count: int,
    fps: float,
    size: int,
    seconds: float,
    max_text_tokens: int | None,
    seed: int,
) -> Load:
    engine, films = _warm(model, processor, count, size, max_text_tokens, seed)
    frames = max(1, round(seconds * fps))
    live = keep_pace(lambda: _step(engine, films), frames, fps)
    held = sum(engine.session(name).usage.cache_bytes for name in films)
    middle, high = np.percentile(live.taken_ms, [50, 95]).round(1).tolist()
    lags = (round(max(live.lags_ms), 1), round(live.lags_ms[-1], 1))
    return Load(count, middle, high, live.dropped, lags, live.dropped == 0 and middle <= 1000 / fps, held)


def _warm(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    count: int,
    size: int,
    max_text_tokens: int | None,
    seed: int,
) -> tuple[StreamingEngine, dict[str, Iterator[Any]]]:
    """An engine whose sessions have watched a few frames, and the rest of their films."""
    engine = StreamingEngine(model, processor, most_sessions=count, most_rows=count)
    films = {}
    for number in range(count):
        engine.open(str(number), max_text_tokens=max_text_tokens, max_new_tokens=16)
        films[str(number)] = handwriting(seed + number, size)
    for _ in range(WARM):
        _step(engine, films)
    return engine, films


def _step(engine: StreamingEngine, films: dict[str, Iterator[Any]]) -> float:
    """One frame for every session; seconds that the engine took."""
    for name, film in films.items():
        engine.offer(name, next(film))
    began = perf_counter()
    engine.step()
    return perf_counter() - began


@dataclass(frozen=True)
class Pace:
    """taken_ms, lags_ms: of each step that was taken. dropped: frames that had no step."""

    taken_ms: list[float]
    lags_ms: list[float]
    dropped: int


def keep_pace(step: Callable[[], float], frames: int, fps: float) -> Pace:
    """`frames` frames that come every 1 / fps seconds, the newest one first; `step` says how many seconds one takes."""
    taken, lags, now, frame = [], [], 0.0, 0
    while frame < frames:
        # the newest that has come; the one that is waited for if there is none
        frame = min(max(frame, math.floor(now * fps + 1e-9)), frames - 1)
        now = max(now, frame / fps)
        seconds = step()
        now += seconds
        taken.append(1000 * seconds)
        lags.append(1000 * (now - frame / fps))
        frame += 1
    return Pace(taken, lags, frames - len(taken))


@dataclass(frozen=True)
class Tried:
    """So many sessions by the real clock. frames: that came, of all of them; watched and dropped: of these.

    behind_ms: from the last frame's coming until all was said.
    """

    sessions: int
    seconds: float
    frames: int
    watched: int
    dropped: int
    behind_ms: float


def try_sessions(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    count: int,
    fps: float = 2.0,
    size: int = 224,
    seconds: float = 10.0,
    max_text_tokens: int | None = 128,
    seed: int = 0,
) -> Tried:
    """`count` sessions by the real clock, for `seconds`, which it takes: frames come whether the engine is ready or
    not, and are opened beside it, in a thread of their own.
    """
    engine, films = _warm(model, processor, count, size, max_text_tokens, seed)
    frames = max(1, round(seconds * fps))
    clips = {name: [_jpeg(next(film)) for _ in range(frames)] for name, film in films.items()}
    watched = 0
    with ThreadPoolExecutor(1, "casa-cameras") as pool:
        fed = pool.submit(feed, engine, clips, fps)
        while not fed.done() or engine.waiting:
            if engine.waiting:
                watched += sum(event.error is None for event in engine.step())
            else:
                time.sleep(POLL_SECONDS)
        behind = time.monotonic() - fed.result()
    dropped = sum(engine.dropped(name) for name in clips)
    return Tried(count, seconds, count * frames, watched, dropped, round(1000 * behind, 1))


def feed(
    engine: StreamingEngine,
    clips: dict[str, list[bytes]],
    fps: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] = time.sleep,
) -> float:
    """Opens each session's frames and offers them, 1 / fps seconds apart, the sessions evenly between one another.

    Returns when the last one was there, by `clock`.
    """
    apart = 1 / (fps * len(clips))
    due = [
        (number / fps + place * apart, name, data)
        for place, (name, clip) in enumerate(clips.items())
        for number, data in enumerate(clip)
    ]
    began = clock()
    for at, name, data in sorted(due, key=lambda frame: frame[0]):
        sleep(max(0.0, began + at - clock()))
        engine.offer(name, picture_from(BytesIO(data)))
    return clock()


def _jpeg(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def sessions_summary(loads: list[Load], fps: float, tried: Tried | None = None) -> dict[str, Any]:
    """tried: the sustained load by the real clock; None where there is none."""
    found: dict[str, Any] = {"fps": fps, "sustained": sustained(loads), "loads": [vars(load) for load in loads]}
    return found if tried is None else found | {"by_the_clock": vars(tried)}


def sustained(loads: list[Load]) -> int:
    """The most sessions that were kept up with; 0 if not even one was."""
    return max((load.sessions for load in loads if load.sustained), default=0)


def sessions_table(loads: list[Load], fps: float, tried: Tried | None = None) -> str:
    """The loads as a few aligned lines."""
    lines = [f"{'sessions':>8}{'step, median':>15}{'95th':>12}{'of a budget of':>17}{'dropped':>9}{'cache of all':>15}"]
    for load in loads:
        lines.append(
            f"{load.sessions:8}{load.median_ms:12.1f} ms{load.p95_ms:9.1f} ms{1000 / fps:14.0f} ms"
            f"{load.dropped:9}{load.bytes / 1024:11.0f} KiB{'' if load.sustained else '   too slow'}"
        )
    if tried is not None:
        lines.append(
            f"by the real clock, {tried.sessions} for {tried.seconds:g} s: {tried.dropped} of {tried.frames} frames "
            f"dropped, {tried.behind_ms:.0f} ms behind at the end"
        )
    return "\n".join(lines)
