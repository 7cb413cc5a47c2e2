"""Records of finished runs, and what they say together: scores over seeds, and differences paired by question."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEAST_SEEDS = 3
ALIKE = 0.03  # a difference whose whole interval is within so many is called none

# what a column of a table asks: kinds of questions, or all of a task
COLUMNS: dict[str, tuple[str, ...]] = {
    "digits": ("pages.digit",),
    "lines": ("pages.line", "pages.last_line"),
    "pages": ("pages",),
    "scenes": ("scenes",),
    "charts": ("charts",),
    "midway": ("midway",),
    "spoken": ("spoken",),
    "all with pictures": ("pages", "scenes", "charts", "midway"),
    "values of charts": ("charts.value", "charts.named"),
    "colours of charts": ("charts.legend", "charts.owner"),
    "comparing in charts": ("charts.most", "charts.higher"),
    "counting": ("scenes.count", "pages.lines", "pages.length"),
    "first of three": ("ordinal.1",),
    "second of three": ("ordinal.2",),
    "last of three": ("ordinal.3",),
    "same colour": ("same",),
    "both between": ("between",),
    "now": ("ago.0",),
    "1 to 3 ago": ("ago.1", "ago.2", "ago.3"),
    "4 to 7 ago": ("ago.4", "ago.5", "ago.6", "ago.7"),
    "printed numbers": ("number",),
    "easy-VQA": ("easy_vqa",),
    "all at the real scale": ("number", "easy_vqa"),
}


@dataclass(frozen=True)
class Difference:
    """One model's score minus another's on the same questions, of seeds that both have.

    Args:
        mean: Over questions and seeds.
        low: Of the 95 % interval, over resampled questions.
        high: The same.
        seeds: The difference of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def reading(self) -> str:
        """What may be said of it: nothing of fewer than three seeds."""
        if len(self.seeds) < LEAST_SEEDS:
            return f"open: {len(self.seeds)} of {LEAST_SEEDS} seeds"
        if self.low > 0 or self.high < 0:
            side = "better" if self.mean > 0 else "worse"
            return side if all(seed * self.mean > 0 for seed in self.seeds) else "unsettled, seeds differ"
        alike = max(-self.low, self.high) <= ALIKE and max(map(abs, self.seeds)) <= 2 * ALIKE
        return "no difference" if alike else "unsettled"


class Records:
    """All records of a folder, by run and seed."""

    def __init__(self, folder: Path) -> None:
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*-seed-*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            self.runs.setdefault(record["run"]["name"], {})[record["run"]["seed"]] = record

    def seeds(self, name: str) -> list[int]:
        """Seeds of which there is a record."""
        return sorted(self.runs.get(name, {}))

    def of(self, name: str) -> list[dict[str, Any]]:
        """Records of a run, by seed."""
        return [self.runs[name][seed] for seed in self.seeds(name)]

    def scores(self, name: str, column: str, part: str | None = None) -> list[float]:
        """The share of right answers of each seed. part: an ablation's name, "whole" or None for the full set."""
        found = [answers(record, column, part) for record in self.of(name)]
        return [float(rights.mean()) for rights in found if len(rights)]

    def difference(
        self, one: str, other: str, column: str, parts: tuple[str | None, str | None] = (None, None)
    ) -> Difference | None:
        """Of two runs, or of two parts taken out of them; None where no seed has both."""
        pairs = [
            (answers(self.runs[one][seed], column, parts[0]), answers(self.runs[other][seed], column, parts[1]))
            for seed in sorted({*self.seeds(one)} & {*self.seeds(other)})
        ]
        pairs = [(a, b) for a, b in pairs if len(a) and len(b)]
        if not pairs:
            return None
        # (seeds, questions): a question is drawn together with all its answers
        gaps = np.array([a - b for a, b in pairs])
        picked = np.random.default_rng(0).integers(gaps.shape[1], size=(RESAMPLES, gaps.shape[1]))
        low, high = np.percentile(gaps.mean(0)[picked].mean(1), [2.5, 97.5])
        return Difference(float(gaps.mean()), float(low), float(high), tuple(gaps.mean(1).tolist()))


def answers(record: Mapping[str, Any], column: str, part: str | None = None) -> NDArray[np.float64]:
    """1 for each question of a column that was answered right, else 0; empty where the run was not asked."""
    return rights_of(record, COLUMNS[column], part)


def rights_of(record: Mapping[str, Any], kinds: Iterable[str], part: str | None = None) -> NDArray[np.float64]:
    """The same of tasks and kinds of questions by their names."""
    scores = record["scores"] if part is None else record.get("ablations", {}).get(part, {})
    bits = "".join(value["exact"] for kind, value in sorted(scores.items()) if _belongs(kind, kinds))
    return np.array([int(bit) for bit in bits], dtype=np.float64)


def _belongs(kind: str, wanted: Iterable[str]) -> bool:
    return any(kind == one or kind.startswith(f"{one}.") for one in wanted)


def points(values: Sequence[float]) -> str:
    """Percent: the mean over seeds, and the least and the greatest where there are several; "-" for none."""
    if not values:
        return "-"
    shown = f"{100 * float(np.mean(values)):.1f}"
    return shown if len(values) == 1 else f"{shown} ({100 * min(values):.0f} to {100 * max(values):.0f})"
