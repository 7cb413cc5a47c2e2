"""Scores of an evaluation as the table of casa-smol's goals, in Markdown.

python -m projects.casa_smol.table docs/results/casa-smol.json
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projects.casa_smol.metrics import JUDGES, wilson
from projects.casa_smol.tasks.documents import DOCUMENTS
from projects.casa_smol.tasks.screens import SCREENS

COLUMNS = {"seen": "casa-smol", "blind": "blind", "told": "told", "tesseract": "tesseract", "ppocr": "PP-OCR",
           "encoder": "page encoder alone"}  # fmt: skip
NAMES = {
    "verbatim": "lines right", "exact": "exact", "relaxed": "relaxed accuracy", "anls": "ANLS",
    "character_error_rate": "character error rate", "word_error_rate": "word error rate",
    "silent": "silent where nothing is new",
    "same_logits": "logits of the text model, to the bit",
}  # fmt: skip
ERRORS = ("character_error_rate", "word_error_rate")  # the fewer the better
BESIDE = (
    "Brackets: 95 % intervals (Wilson's for shares, the bootstrap's for error rates). **Bold**: the goal is met. "
    "Blind: without the picture. Told: with the answer's text in its place; right if a sentence with it is said. "
    "≤: a reader answers no questions; of the answers that stand in a document it has read so many, somewhere."
)


@dataclass(frozen=True)
class Row:
    """A line of the table. goal: a share; None for none, "nearest" for the nearest neighbour's."""

    name: str
    tasks: Sequence[str]
    measure: str
    goal: float | str | None = None


ROWS = (
    Row("a printed line", ("line",), "character_error_rate", 0.025),
    Row("a printed line", ("line",), "verbatim", 0.85),
    Row("line n of a page, the line after another", ("page",), "verbatim", 0.80),
    Row("documents", tuple(DOCUMENTS), "exact", 0.85),
    Row("documents", tuple(DOCUMENTS), "anls"),
    Row("charts", ("chart",), "relaxed", 0.80),
    Row("screens", tuple(SCREENS), "exact", 0.75),
    Row("drawings, a style never seen", ("drawing_new_style",), "exact", "nearest"),
    Row("drawings, seen styles", ("drawing_seen_style",), "exact", "nearest"),
    Row("drawings, names never seen", ("drawing_new_name",), "exact"),
    Row("easy-VQA, its test", ("easy_vqa",), "exact", 0.97),
    Row("text appearing in a film", ("film",), "word_error_rate", 0.10),
    Row("text appearing in a film", ("film",), "silent"),
    Row("text only", ("text_only",), "same_logits", 1.0),
)


def table(told: Mapping[str, Any]) -> str:
    """The table of what `evaluation` has written; rows of which nothing is known are left out."""
    rows = [
        ["task", "measure", "goal", *COLUMNS.values(), "questions"],
        ["---"] * 3 + ["--:"] * (len(COLUMNS) + 1),
        *(cells for row in ROWS if (cells := _cells(row, told["scores"]))),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + f"\n\n{BESIDE}"


def _cells(row: Row, scores: Mapping[str, Any]) -> list[str] | None:
    known = [scores[task] for task in row.tasks if scores.get(task)]
    if not known:
        return None
    goal = row.goal
    if goal == "nearest":
        nearest = _pooled(known, "nearest", row.measure)
        goal = None if nearest is None else nearest[0]
    asked = sum(_count(next(iter(own.values()))) for own in known)
    cells = [_cell(known, column, row, goal) for column in COLUMNS]
    return [row.name, NAMES[row.measure], _shown(row, goal), *cells, f"{asked:,}"]


def _count(own: Mapping[str, Any]) -> int:
    return next(own[name] for name in ("questions", "films", "prompts") if name in own)


def _shown(row: Row, goal: Any) -> str:
    if goal is None:
        return ""
    if row.goal == "nearest":
        return f"above {_percent(goal)}, the nearest neighbour"
    return f"{'≤' if row.measure in ERRORS else '≥'} {_percent(goal)}"


def _cell(known: Sequence[Mapping[str, Any]], column: str, row: Row, goal: Any) -> str:
    told_in_words = column == "told" and row.measure in JUDGES
    pooled = _pooled(known, column, "contained" if told_in_words else row.measure)
    if pooled is None:
        most = _pooled(known, column, "was_read") if row.measure == "exact" else None
        return f"≤ {_percent(most[0])}" if most else ""
    share, ends = pooled
    text = _percent(share) + (f" ({100 * ends[0]:.1f}–{100 * ends[1]:.1f})" if ends else "")
    if column != "seen" or goal is None:
        return text
    met = share <= goal if row.measure in ERRORS else share > goal if row.goal == "nearest" else share >= goal
    return f"**{text}**" if met else text


def _pooled(
    known: Sequence[Mapping[str, Any]], column: str, measure: str
) -> tuple[float, tuple[float, float] | None] | None:
    """A measure over all questions of several tasks, with its interval; None if it is not there for each."""
    own = [task.get(column, {}) for task in known]
    if not all(measure in one for one in own):
        return None
    if measure == "same_logits":
        return own[0][measure] / own[0]["prompts"], None
    if len(own) == 1:
        ends = own[0].get(f"{measure}_interval")
        return own[0][measure], tuple(ends) if ends else None
    counts = [one["questions"] for one in own]
    share = sum(one[measure] * count for one, count in zip(own, counts, strict=True)) / max(1, sum(counts))
    return share, wilson(share, sum(counts)) if f"{measure}_interval" in own[0] else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(arguments: list[str]) -> int:
    """Prints the table of a file."""
    if len(arguments) != 1:
        print("Name the JSON file that projects.casa_smol.evaluation has written.", file=sys.stderr)
        return 2
    print(table(json.loads(Path(arguments[0]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
