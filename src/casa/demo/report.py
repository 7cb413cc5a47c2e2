"""What a run of the demo found, and how it is told."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from casa.analysis.streaming_cost import CostRow
from casa.demo.questions import Answered
from casa.evaluation.metrics import normalise, word_error_rate, words


@dataclass(frozen=True)
class DemoReport:
    """times (s), said, rows: one per frame watched. truth: the true captions, or None for a video of one's own.

    answers: to the questions about the frame at `asked_at` (s). files: what was written. seconds: the whole run.
    seed: of the shipped film, None for a video of one's own.
    """

    times: tuple[float, ...]
    said: tuple[str, ...]
    truth: tuple[str, ...] | None
    rows: tuple[CostRow, ...]
    asked_at: float
    answers: tuple[Answered, ...]
    files: tuple[Path, ...]
    seconds: float
    seed: int | None = None

    @property
    def wer(self) -> float | None:
        """Word error rate of the captions; None where there is no truth, or it holds no word."""
        if self.truth is None or not words(self.truth):
            return None
        return word_error_rate([(self.truth, self.said)])

    @property
    def latency(self) -> float:
        """Median seconds from a frame to its caption."""
        return median(row.casa.seconds for row in self.rows)

    def figures(self) -> dict[str, Any]:
        """What was measured, as plain values: times in s, sizes in bytes after the first and the last frame."""
        first, last = self.rows[0], self.rows[-1]
        found: dict[str, Any] = {
            "seconds": round(self.seconds, 1),
            "frames": len(self.rows),
            "wer": self.wer,
            "latency": round(self.latency, 4),
            "cache_bytes": [first.casa.usage.cache_bytes, last.casa.usage.cache_bytes],
        }
        if first.insertion is not None and last.insertion is not None:
            found["insertion_cache_bytes"] = [first.insertion.usage.cache_bytes, last.insertion.usage.cache_bytes]
        return found

    def lines(self) -> list[str]:
        """The figures, the answers and the files, one line each."""
        first, last = self.rows[0].casa, self.rows[-1].casa
        quarter = max(1, len(self.rows) // 4)
        begin, end = (
            1000 * median(row.casa.seconds for row in part) for part in (self.rows[:quarter], self.rows[-quarter:])
        )
        told = [""]
        if self.wer is not None:
            told.append(f"word error rate   {100 * self.wer:.1f} % of {len(words(self.truth or ()))} numbers")
        told += [
            f"speed             {1 / self.latency:.1f} frames a second, with CASA; the stream has 2",
            f"latency           {begin:.0f} ms a frame in the first quarter, {end:.0f} ms in the last",
            f"cache, CASA       {_size(first.usage.cache_bytes)} after the first frame, "
            f"{_size(last.usage.cache_bytes)} after frame {len(self.rows)}",
        ]
        rival = [row.insertion for row in self.rows if row.insertion is not None]
        if rival:
            told.append(
                f"cache, insertion  {_size(rival[0].usage.cache_bytes)} after the first frame, "
                f"{_size(rival[-1].usage.cache_bytes)} after frame {len(rival)}; "
                f"{1000 * median(cost.seconds for cost in rival[-quarter:]):.0f} ms a frame at the end"
            )
        told += ["", f"Asked about the frame at {self.asked_at:.1f} s:"]
        for answered in self.answers:
            note = "" if answered.truth is None else f"   ({mark(answered.answer, answered.truth)})"
            told.append(f"  {answered.question}  {answered.answer or '(nothing)'}{note}")
        told += ["", f"Written in {self.seconds:.0f} s:"]
        return told + [f"  {path}  {_size(path.stat().st_size)}" for path in self.files]


def mark(said: str, truth: str) -> str:
    """How a caption or answer compares with its truth: right, wrong, missed (not said) or extra (nothing there)."""
    if normalise(said) == normalise(truth):
        return "right"
    if not said:
        return "missed"
    return "wrong" if truth else "extra"


def heading(with_truth: bool) -> str:
    """The first line of the table of captions."""
    return "    time  said      truth     mark" if with_truth else "    time  said"


def line(time: float, said: str, truth: str | None) -> str | None:
    """One line of the table; None for a frame about which there is nothing to say."""
    if truth is None:
        return f"{time:6.1f} s  {said}" if said else None
    return f"{time:6.1f} s  {said or '-':8s}  {truth or '-':8s}  {mark(said, truth)}" if said or truth else None


def _size(number: int) -> str:
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= divisor:
            return f"{number / divisor:.1f} {unit}"
    return f"{number} bytes"
