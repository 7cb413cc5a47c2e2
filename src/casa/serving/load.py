"""What this machine sustains, what is asked of it, and what is to be said where that is too much.

    model's thread --stepped--> seconds, turns, streams in a step  -> frames a second that it sustains
    streams        --count--->  watched, dropped, cut in the last minute -> whether it is overloaded

A frame's cost is its share of the steps in which it was watched: streams that wait together share a step, so a frame
costs less the more of them there are. How much less is tried once, at start (`probe`), on pictures of noise; from then
on what the streams really cost counts, with that shape. Before anything was measured, nothing is claimed and everybody
is let in.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from time import monotonic

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import Count, Sampling, StreamingEngine

RECENT_SECONDS = 60.0
STREAM_SECONDS = 20.0  # over which a single stream is judged
SMALLEST_FPS = 0.1  # not worth asking for less
PROBE_ROWS = (1, 2, 4, 8, 16)
PROBE_SIDE = 448
PROBE_WORDS = 4
REMEDY = "ask for fewer frames a second, send smaller pictures, or have fewer streams at once"


class OverloadedError(UserError):
    """One stream more than this machine sustains."""


class Recent:
    """Counts of the last so many seconds; any thread may count."""

    def __init__(self, seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._lock = threading.Lock()
        self._parts: deque[tuple[int, Counter[str]]] = deque()  # whole seconds, oldest first
        self._began: float | None = None

    def count(self, kind: str, by: int = 1) -> None:
        now = self._clock()
        with self._lock:
            if not self._parts or self._parts[-1][0] != int(now):
                self._parts.append((int(now), Counter()))
            self._parts[-1][1][kind] += by
            self._began = now if self._began is None else self._began
            self._forget(now)

    def totals(self) -> Counter[str]:
        with self._lock:
            self._forget(self._clock())
            return sum((counts for _, counts in self._parts), Counter())

    @property
    def is_too_much(self) -> bool:
        """Whether the machine is too slow for what it was given, as in `Count`."""
        counts = self.totals()
        return Count(counts["watched"], counts["dropped"], counts["cut"]).is_too_much

    @property
    def seconds(self) -> float:
        """How long there has been counting, up to the length of this memory; 1 or more."""
        since = self._clock() if self._began is None else self._began
        return max(1.0, min(self._seconds, self._clock() - since))

    def _forget(self, now: float) -> None:
        while self._parts and self._parts[0][0] < now - self._seconds:
            self._parts.popleft()


def slow_sentence(fps: float, recent: Recent) -> str | None:
    """What a stream is told that means to send `fps` frames a second; None if all is well."""
    if not recent.is_too_much:
        return None
    counts = recent.totals()
    watched = counts["watched"] / recent.seconds
    cuts = "1 caption was" if counts["cut"] == 1 else f"{counts['cut']} captions were"
    cut = f", and {cuts} cut short" if counts["cut"] else ""
    return (
        f"This machine is too slow for that: of {fps:g} frames a second it watches about {watched:.2g}{cut}. "
        f"{REMEDY[0].upper()}{REMEDY[1:]}."
    )


class Load:
    """rows: the most streams that share a step. share: of what the machine sustains that streams may ask for in all."""

    def __init__(self, rows: int, share: float = 1.0, clock: Callable[[], float] = monotonic) -> None:
        self._rows, self._share, self._clock = rows, share, clock
        self._lock = threading.Lock()
        self._shape: dict[int, float] = {}  # rows of a step -> its seconds, as tried at start
        self._steps: deque[tuple[float, float, int, int]] = deque()  # when, seconds, streams in it, turns that ended
        self.recent = Recent(RECENT_SECONDS, clock)

    def stepped(self, seconds: float, rows: int, turns: int) -> None:
        """A step over so many streams, in which so many turns came to their end."""
        now = self._clock()
        with self._lock:
            self._steps.append((now, seconds, rows, turns))
            while self._steps[0][0] < now - RECENT_SECONDS:
                self._steps.popleft()

    def tried(self, rows: int, seconds: float) -> None:
        """How long a step over so many streams takes, each with a frame and a few words."""
        with self._lock:
            self._shape[rows] = seconds

    def sustained(self, streams: int) -> float | None:
        """Frames a second that this machine watches where so many streams want all of them; None if nobody knows."""
        rows = max(1, min(streams, self._rows))
        with self._lock:
            seconds = sum(step[1] for step in self._steps)
            turns = sum(step[3] for step in self._steps)
            if turns and seconds > 0:
                usual = sum(step[1] * step[2] for step in self._steps) / seconds
                return turns / seconds * self._each(usual) / self._each(rows)
            return 1 / self._each(rows) if self._shape else None

    def _each(self, rows: float) -> float:
        """Seconds of a frame in a step over so many, as tried, or between and beyond the sizes that were."""
        if not self._shape:
            return 1.0
        known = sorted((size, seconds / size) for size, seconds in self._shape.items())
        # a larger batch is never dearer: where it seemed so, something else ran
        known = [(size, min(each for _, each in known[: at + 1])) for at, (size, _) in enumerate(known)]
        for (low, dear), (high, cheap) in pairwise(known):
            if low <= rows <= high:
                return dear + (cheap - dear) * (rows - low) / (high - low)
        return known[0][1] if rows < known[0][0] else known[-1][1]

    def admit(self, fps: float, asked: Iterable[float]) -> str | None:
        """What to tell a new stream of so many frames a second, beside others that ask for `asked`; None if it fits.

        The first is let in whatever it asks for: what is too much is dropped, and is nobody else's.

        Raises OverloadedError if it is more than this machine sustains.
        """
        others = list(asked)
        sustained, total = self.sustained(len(others) + 1), sum(others)
        if sustained is None or total + fps <= self._share * sustained:
            return None
        machine = f"this machine watches about {sustained:.2g} frames a second with this model"
        if not others:
            return f"{machine[0].upper()}{machine[1:]}; of {fps:g} the others will be dropped. To lose none, {REMEDY}."
        number = "1 stream asks" if len(others) == 1 else f"{len(others)} streams ask"
        left = self._share * sustained - total
        possible = f"ask for at most {_below(left)} (fps), or " if left >= SMALLEST_FPS else ""
        raise OverloadedError(
            f"{machine}, and {number} for {total:.3g} already; {possible}come back when there are fewer streams."
        )

    def report(self, asked: Iterable[float]) -> dict[str, float | int | None]:
        """sustained_fps, asked_fps: frames a second; watched, dropped, cut: in the last minute."""
        wanted = list(asked)
        sustained, counts = self.sustained(len(wanted)), self.recent.totals()
        return {
            "sustained_fps": None if sustained is None else round(sustained, 2),
            "asked_fps": round(sum(wanted), 2),
            **{kind: counts[kind] for kind in ("watched", "dropped", "cut")},
        }

    @property
    def is_over(self) -> bool:
        """Whether frames were dropped or captions cut in the last minute, more than now and then."""
        return self.recent.is_too_much


def _below(fps: float) -> str:
    """A rate as text, never above it."""
    digits = 0 if fps >= 10 else 1
    return f"{int(fps * 10**digits) / 10**digits:.{digits}f}".removesuffix(".0")


def probe(
    load: Load,
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    seconds: float = 2.0,
    clock: Callable[[], float] = monotonic,
) -> None:
    """Tries steps over one stream and more, on the model's thread, for about so long; over one in any case."""
    engine = StreamingEngine(model, processor, most_sessions=max(PROBE_ROWS), most_rows=load._rows)
    noise = np.random.default_rng(0).integers(0, 255, (PROBE_SIDE, PROBE_SIDE, 3), dtype=np.uint8)
    picture, begun, took = Image.fromarray(noise), clock(), 0.0
    # the first one warms up, and counts only if there is no time for another
    for rows in (1, *(rows for rows in PROBE_ROWS if rows <= load._rows)):
        if took and clock() - begun + 2 * took > seconds:
            return
        while len(engine) < rows:
            # an endless talker, so that a step has words in it
            engine.open(str(len(engine)), max_new_tokens=PROBE_WORDS, sampling=Sampling(stop_bias=-1e9))
        for name in range(rows):
            engine.offer(str(name), picture)
        start = clock()
        engine.step()
        took = clock() - start
        load.tried(rows, took)
