"""What a server counts and measures: figures for Prometheus, and what this machine sustains beside what is asked of it.

A frame's cost is its share of the steps in which it was watched: it costs less the more streams share a step. How much
less is tried once, at start (`probe`), on noise; from then on what the streams really cost counts, with that
shape. Before anything was measured, nothing is claimed and everybody is let in.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from time import monotonic

import numpy as np
import prometheus_client as prometheus
from PIL import Image

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import Sampling, StreamingEngine, WatchCounts
from casa.streaming.pacing import Clock

COUNTERS = {
    "frames": "Frames watched.",
    "captions": "Captions said; silence is none.",
    "answers": "Questions answered in streams.",
    "dropped": "Frames replaced by a newer one, or refused, before they were watched.",
    "missed": "Captions that slow readers lost.",
    "truncated": "Captions and answers cut at their budget.",
    "errors": "Messages, frames and requests that were refused.",
    "streams": "Streams opened.",
    "chats": "Chat completions begun.",
    "moved": "Streams that went on at another replica.",
}
GAUGES = {
    "sessions": "Live streams.",
    "connections": "Open WebSockets.",
    "running_chats": "Chat completions under way.",
    "waiting_chats": "Chats that wait for their turn.",
    "cache_bytes": "Bytes that the live streams' caches hold.",
    "sustained_fps": "Frames a second that this machine sustains; 0 before anything was measured.",
    "asked_fps": "Frames a second that the live streams mean to send.",
    "replicas": "Replicas behind this ingress.",
}
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RECENT_SECONDS = 60.0
STREAM_SECONDS = 20.0  # over which a single stream is judged
MIN_FPS = 0.1  # not worth asking for less
PROBE_ROWS = (1, 2, 4, 8, 16)
PROBE_SIDE = 448
PROBE_WORDS = 4
REMEDY = "ask for fewer frames a second, send smaller pictures, or have fewer streams at once"


class OverloadedError(UserError):
    """One stream more than this machine sustains."""


class Metrics:
    """Counters, gauges, and one histogram: seconds from a frame's arrival to its caption. Any thread may count."""

    def __init__(self) -> None:
        self._all = own = prometheus.CollectorRegistry()
        self._counters = {
            name: prometheus.Counter(f"casa_{name}", text, registry=own) for name, text in COUNTERS.items()
        }
        self._gauges = {name: prometheus.Gauge(f"casa_{name}", text, registry=own) for name, text in GAUGES.items()}
        meaning = "Seconds from a frame's arrival to its caption."
        self._lag = prometheus.Histogram("casa_lag_seconds", meaning, buckets=BUCKETS, registry=own)

    def count(self, name: str) -> None:
        self._counters[name].inc()

    def counted(self, name: str) -> float:
        return self._all.get_sample_value(f"casa_{name}_total") or 0.0

    def observe(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def text(self, gauges: Mapping[str, float]) -> bytes:
        """Prometheus' text format. gauges: today's values."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        return prometheus.generate_latest(self._all)


class RecentCounts:
    """Counts of the last so many seconds; any thread may count."""

    def __init__(self, seconds: float, clock: Clock = monotonic) -> None:
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

    def totals(self) -> Counter[str]:
        with self._lock:
            while self._parts and self._parts[0][0] < self._clock() - self._seconds:
                self._parts.popleft()
            return sum((counts for _, counts in self._parts), Counter())

    @property
    def is_too_much(self) -> bool:
        """Whether the machine is too slow for what it was given, as in `WatchCounts`."""
        counts = self.totals()
        return WatchCounts(counts["watched"], counts["dropped"], counts["truncated"]).is_too_much

    def advice(self, fps: float) -> str | None:
        """What a stream is told that means to send `fps` frames a second; None if all is well."""
        if not self.is_too_much:
            return None
        counts, now = self.totals(), self._clock()
        so_far = now - (now if self._began is None else self._began)
        watched = counts["watched"] / max(1.0, min(self._seconds, so_far))
        cuts = "1 caption was" if counts["truncated"] == 1 else f"{counts['truncated']} captions were"
        cut = f", and {cuts} cut short" if counts["truncated"] else ""
        return (
            f"This machine is too slow for that: of {fps:g} frames a second it watches about {watched:.2g}{cut}. "
            f"{REMEDY[0].upper()}{REMEDY[1:]}."
        )


class LoadMeter:
    """What the machine sustains, and whether one more stream fits.

    Args:
        rows: the most streams that share a step.
        share: of what the machine sustains that streams may ask for in all.
        clock: in seconds.
    """

    def __init__(self, rows: int, share: float = 1.0, clock: Clock = monotonic) -> None:
        self.rows, self._share, self._clock = rows, share, clock
        self._lock = threading.Lock()
        self._shape: dict[int, float] = {}  # rows of a step -> its seconds, as tried at start
        self._steps: deque[tuple[float, float, int, int]] = deque()  # when, seconds, streams in it, turns that ended
        self.recent = RecentCounts(RECENT_SECONDS, clock)

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
        rows = max(1, min(streams, self.rows))
        with self._lock:
            seconds, turns = sum(step[1] for step in self._steps), sum(step[3] for step in self._steps)
            if turns and seconds > 0:
                usual = sum(step[1] * step[2] for step in self._steps) / seconds
                return turns / seconds * self._each(usual) / self._each(rows)
            return 1 / self._each(rows) if self._shape else None

    def _each(self, rows: float) -> float:
        """Seconds of a frame in a step over so many, as tried, or between and beyond the sizes that were."""
        if not self._shape:
            return 1.0
        sizes = sorted(self._shape)
        # a larger batch is never dearer: where it seemed so, something else ran
        costs = np.minimum.accumulate([self._shape[size] / size for size in sizes])
        return float(np.interp(rows, sizes, costs))

    def admit(self, fps: float, asked: Iterable[float]) -> str | None:
        """What to tell a new stream of so many frames a second, beside others that ask for `asked`; None if it fits.

        The first is let in whatever it asks for: what is too much is dropped, and costs nobody else.

        Raises:
            OverloadedError: it is more than this machine sustains.
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
        digits = 0 if left >= 10 else 1
        below = int(left * 10**digits) / 10**digits  # a rate as text, never above it
        possible = f"ask for at most {below:g} (fps), or " if left >= MIN_FPS else ""
        raise OverloadedError(
            f"{machine}, and {number} for {total:.3g} already; {possible}come back when there are fewer streams."
        )

    def report(self, asked: Iterable[float]) -> dict[str, float | int | None]:
        """Figures for `/health`.

        Args:
            asked: Frames a second that each stream means to send.

        Returns:
            sustained_fps (None before anything was measured) and asked_fps, in frames a second; watched, dropped and
            truncated, counts of the last minute.
        """
        wanted = list(asked)
        sustained, counts = self.sustained(len(wanted)), self.recent.totals()
        return {
            "sustained_fps": None if sustained is None else round(sustained, 2),
            "asked_fps": round(sum(wanted), 2),
            **{kind: counts[kind] for kind in ("watched", "dropped", "truncated")},
        }


def probe(
    load: LoadMeter,
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    seconds: float = 2.0,
    clock: Clock = monotonic,
) -> None:
    """Tries steps over one stream and more, on the model's thread, for about so long; over one in any case."""
    engine = StreamingEngine(model, processor, max_sessions=max(PROBE_ROWS), max_batch_size=load.rows)
    noise = np.random.default_rng(0).integers(0, 255, (PROBE_SIDE, PROBE_SIDE, 3), dtype=np.uint8)
    picture, begun, took = Image.fromarray(noise), clock(), 0.0
    # the first one warms up, and counts only if there is no time for another
    for rows in (1, *(rows for rows in PROBE_ROWS if rows <= load.rows)):
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
