"""How many live streams one machine sustains: sessions in one batch, each with a new frame every 1 / fps seconds.

The clock of the streams is moved by the steps as they are measured: a step that takes longer than 1 / fps makes the
next one late, and a frame that is replaced before its turn is dropped, as it would be live. Drawing the frames is not
counted: cameras do that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from casa.benchmarks.stream import handwriting
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import StreamingEngine

WARM = 2  # steps before the clock counts


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
    """Loads of 1, 2, 4, ... up to `most` sessions, each watching handwriting of its own for `seconds` of film.

    A load is sustained if no frame is dropped and half of the steps end before the next frames come. Stops behind the
    first that is not.
    Raises UserError for a rate, a size or a number that cannot be.
    """
    if most < 1 or not fps > 0 or not seconds > 0:
        raise UserError("most is 1 or more, and fps and seconds are above 0.")
    found: list[Load] = []
    count = 1
    while count <= most and (not found or found[-1].sustained):
        found.append(_load(model, processor, count, fps, size, seconds, max_text_tokens, seed))
        count = min(2 * count, most) if count < most else most + 1
    return found


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
    engine = StreamingEngine(model, processor, most_sessions=count, most_rows=count)
    films = {}
    for number in range(count):
        engine.open(str(number), max_text_tokens=max_text_tokens, max_new_tokens=16)
        films[str(number)] = handwriting(seed + number, size)
    frames = max(1, round(seconds * fps))
    for _ in range(WARM):
        _step(engine, films)
    live = keep_pace(lambda: _step(engine, films), frames, fps)
    held = sum(engine.session(name).usage.cache_bytes for name in films)
    middle, high = np.percentile(live.taken_ms, [50, 95]).round(1).tolist()
    lags = (round(max(live.lags_ms), 1), round(live.lags_ms[-1], 1))
    return Load(count, middle, high, live.dropped, lags, live.dropped == 0 and middle <= 1000 / fps, held)


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


def sessions_summary(loads: list[Load], fps: float) -> dict[str, Any]:
    most = max((load.sessions for load in loads if load.sustained), default=0)
    return {"fps": fps, "sustained": most, "loads": [vars(load) for load in loads]}


def sessions_table(loads: list[Load], fps: float) -> str:
    """The loads as a few aligned lines."""
    lines = [f"{'sessions':>8}{'step, median':>15}{'95th':>12}{'of a budget of':>17}{'dropped':>9}{'cache of all':>15}"]
    for load in loads:
        lines.append(
            f"{load.sessions:8}{load.median_ms:12.1f} ms{load.p95_ms:9.1f} ms{1000 / fps:14.0f} ms"
            f"{load.dropped:9}{load.bytes / 1024:11.0f} KiB{'' if load.sustained else '   too slow'}"
        )
    return "\n".join(lines)
