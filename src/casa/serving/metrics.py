"""Counts of a server in Prometheus' text format (version 0.0.4)."""

import threading
from collections.abc import Mapping

COUNTERS = {
    "frames": "Frames watched.",
    "captions": "Captions said; silence is none.",
    "answers": "Questions answered in streams.",
    "dropped": "Frames replaced by a newer one, or refused, before they were watched.",
    "missed": "Captions that slow readers lost.",
    "cut": "Captions and answers cut at their budget.",
    "errors": "Messages, frames and requests that were refused.",
    "streams": "Streams opened.",
    "chats": "Chat completions begun.",
}
GAUGES = {
    "sessions": "Live streams.",
    "connections": "Open WebSockets.",
    "running_chats": "Chat completions under way.",
    "waiting_chats": "Chats that wait for their turn.",
    "cache_bytes": "Bytes that the live streams' caches hold.",
    "sustained_fps": "Frames a second that this machine sustains; 0 before anything was measured.",
    "asked_fps": "Frames a second that the live streams mean to send.",
}
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PREFIX = "casa"


class Metrics:
    """Counters, and one histogram: seconds from a frame's arrival to its caption. Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._buckets = [0] * len(BUCKETS)
        self._seconds, self._observed = 0.0, 0

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def counted(self, name: str) -> int:
        with self._lock:
            return self._counts[name]

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._seconds += seconds
            self._observed += 1
            for index, edge in enumerate(BUCKETS):
                self._buckets[index] += seconds <= edge

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page for a scraper. gauges: today's value of each of GAUGES."""
        lines = []
        with self._lock:
            for name, meaning in COUNTERS.items():
                lines += _head(f"{name}_total", "counter", meaning)
                lines.append(f"{PREFIX}_{name}_total {self._counts[name]}")
            for name, meaning in GAUGES.items():
                lines += _head(name, "gauge", meaning)
                lines.append(f"{PREFIX}_{name} {gauges[name]}")
            lines += _head("lag_seconds", "histogram", "Seconds from a frame's arrival to its caption.")
            for edge, count in zip(BUCKETS, self._buckets, strict=True):
                lines.append(f'{PREFIX}_lag_seconds_bucket{{le="{edge:g}"}} {count}')
            lines.append(f'{PREFIX}_lag_seconds_bucket{{le="+Inf"}} {self._observed}')
            lines.append(f"{PREFIX}_lag_seconds_sum {self._seconds:.6f}")
            lines.append(f"{PREFIX}_lag_seconds_count {self._observed}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {meaning}", f"# TYPE {PREFIX}_{name} {kind}"]
