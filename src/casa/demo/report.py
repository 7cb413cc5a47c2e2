"""What a run of the demo found: as lines of text, as figures, and as one picture of it all."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from casa.analysis.budget import readable
from casa.analysis.streaming_cost import CostRow
from casa.atomic import replacing
from casa.evaluation.metrics import normalise, word_error_rate, words
from casa.media import draw_caption

_size = partial(readable, unit="B", step=1024)
STILLS = 4  # captioned frames in the picture of a run
_WIDTH, _GAP = 1350, 12  # px of that picture, and between its parts


@dataclass(frozen=True)
class FrameAnswer:
    """A question about a frame, what the model said, and what is right (None where nobody knows)."""

    question: str
    answer: str
    truth: str | None


@dataclass(frozen=True)
class DemoReport:
    """What was watched, said, asked and measured.

    Attributes:
        times: Time of each frame watched, s.
        said: Its caption.
        truth: Its true caption; None for a video of one's own.
        rows: What it cost.
        asked_at: Time of the frame that was asked about, s.
        answers: The answers about it.
        files: What was written.
        seconds: How long the whole run took.
        seed: Of the shipped film; None for a video of one's own.
    """

    times: tuple[float, ...]
    said: tuple[str, ...]
    truth: tuple[str, ...] | None
    rows: tuple[CostRow, ...]
    asked_at: float
    answers: tuple[FrameAnswer, ...]
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
        costs = [row.casa for row in self.rows]
        quarter = max(1, len(costs) // 4)
        begin, end = (1000 * median(cost.seconds for cost in part) for part in (costs[:quarter], costs[-quarter:]))
        told = [""]
        if self.wer is not None:
            told.append(f"word error rate   {100 * self.wer:.1f} % of {len(words(self.truth or ()))} numbers")
        told += [
            f"speed             {1 / self.latency:.1f} frames a second, with CASA; the stream has 2",
            f"latency           {begin:.0f} ms a frame in the first quarter, {end:.0f} ms in the last",
            f"cache, CASA       {readable(costs[0].usage.cache_bytes, 'B', 1024)} after the first frame, "
            f"{readable(costs[-1].usage.cache_bytes, 'B', 1024)} after frame {len(costs)}",
        ]
        rival = [row.insertion for row in self.rows if row.insertion is not None]
        if rival:
            told.append(
                f"cache, insertion  {readable(rival[0].usage.cache_bytes, 'B', 1024)} after the first frame, "
                f"{readable(rival[-1].usage.cache_bytes, 'B', 1024)} after frame {len(rival)}; "
                f"{1000 * median(cost.seconds for cost in rival[-quarter:]):.0f} ms a frame at the end"
            )
        told += ["", f"Asked about the frame at {self.asked_at:.1f} s:"]
        for found in self.answers:
            note = "" if found.truth is None else f"   ({mark(found.answer, found.truth)})"
            told.append(f"  {found.question}  {found.answer or '(nothing)'}{note}")
        told += ["", f"Written in {self.seconds:.0f} s:"]
        return told + [f"  {path}  {readable(path.stat().st_size, 'B', 1024)}" for path in self.files]


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


def write_poster(path: Path, stills: Sequence[tuple[Image.Image, str]], plots: Sequence[Path]) -> None:
    """Writes up to four stills (picture, what was said about it) side by side over the plots; the README shows it."""
    side = (_WIDTH - (STILLS - 1) * _GAP) // STILLS
    shown = [_still(picture, text, side) for picture, text in stills[:STILLS]]
    rows = [[(number * (side + _GAP), still) for number, still in enumerate(shown)]] if shown else []
    for plot in plots:
        with Image.open(plot) as opened:
            rows.append([(0, _fitted(opened.convert("RGB"), _WIDTH))])
    heights = [max(part.height for _, part in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (_WIDTH, sum(heights) - _GAP), "white")
    for number, row in enumerate(rows):
        for left, part in row:
            sheet.paste(part, (left, sum(heights[:number])))
    with replacing(path) as unfinished:
        sheet.quantize(192).save(unfinished, "PNG", optimize=True)


def _still(picture: Image.Image, text: str, side: int) -> Image.Image:
    """The picture with its caption beneath, where it hides nothing."""
    fitted = _fitted(picture.convert("RGB"), side)
    roomy = Image.new("RGB", (side, fitted.height + side // 7), "black")
    roomy.paste(fitted)
    return draw_caption(roomy, text)


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
