"""Questions asked, answered and scored, record by record, in a file that is gone on with after any stop.

A line of the file, in the order of the data once all is done:

    {"index": 0, "record": "qa.jsonl:1", "question": "...", "references": ["..."], "answer": "...",
     "scores": {"anls": 1.0}, "seconds": 0.4}
    {"record": "qa.jsonl:2", "error": "unreadable-picture", "why": "..."}
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from casa.atomic import check_writable, write_text
from casa.data.record import BadRecord
from casa.errors import UserError
from casa.evaluation.metrics import METRICS, Score
from casa.evaluation.questions import BadQuestion, Question

BLOCK_QUESTIONS, BLOCK_BYTES = 1024, 2**28  # that wait to be sorted by cost
RESAMPLES = 1000

Line = dict[str, Any]
Scorer = Callable[[Line], Score | None]
"""From a line of a question that was answered to its score; None where it does not apply."""
OnProgress = Callable[[int], None]
Watch = Callable[[Question], Line]
"""Captions a live record: gives further fields of its line, `answer` among them. Raises BadRecord."""
Spread = Callable[[Iterator[list[Question]]], Iterable[list[Line]]]


class Answers(Protocol):
    """What answers questions, in batches of its own making: the same questions always in the same ones."""

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]: ...

    def answer(self, questions: Sequence[Question]) -> list[str | BadRecord]: ...


class RecordsFile:
    """The lines of a run, in memory and, if a path is given, in a file that survives any stop.

    Beside the file stands FILE.run.json, which says what was asked of which model: a run is gone on with as it began.

    Args:
        path: The file; None keeps lines in memory only.
        run: What must be the same for a run to go on.
        resume: Goes on with the file, if it is there.

    Raises:
        UserError: The file is there and `resume` is false, it is of another run, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, run: Mapping[str, Any], resume: bool = False) -> None:
        self._path = None if path is None else Path(path)
        self.lines: dict[str, Line] = {}
        if self._path is None:
            return
        beside = self._path.with_name(f"{self._path.name}.run.json")
        if self._path.exists() and not resume:
            raise UserError(
                f"{path} is there already; go on with it by resume=True, or name another file for records.",
                field=("resume", "records"),
            )
        if self._path.exists():
            self._check(beside, run)
            self._read(self._path)
        else:
            check_writable(self._path)
            write_text(beside, json.dumps(run, indent=2) + "\n")

    def _check(self, beside: Path, run: Mapping[str, Any]) -> None:
        try:
            before = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"{beside} is missing or damaged, which says what {self._path} is of; name another file for records.",
                field="records",
            ) from None
        now = json.loads(json.dumps(run))
        if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            raise UserError(
                f"{self._path} is of a run with another {', '.join(other)}; name another file for records.",
                field="records",
            )

    def _read(self, path: Path) -> None:
        """Takes over whole lines, and cuts off what a stop left behind them. What was wrong may have been mended."""
        held = path.read_bytes()
        whole = 0
        for piece in held.splitlines(keepends=True):
            try:
                line = json.loads(piece) if piece.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict) or "record" not in line:
                break
            self.lines |= {} if "error" in line else {_name(line): line}
            whole += len(piece)
        if whole < len(held):
            with path.open("r+b") as file:
                file.truncate(whole)

    def add(self, lines: Sequence[Line]) -> None:
        """Appends lines that are not there yet."""
        new = {name: line for line in lines if (name := _name(line)) not in self.lines}
        self.lines |= new
        if self._path is not None and new:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new.values())
            with self._path.open("ab") as file:
                # one call, so that a stop rarely leaves half a line
                file.write(text.encode("utf-8", "replace"))

    def finish(self) -> list[Line]:
        """All lines in the order of the data, bad records last; the file has the same."""
        found = sorted(self.lines.values(), key=lambda line: (line.get("index", float("inf")), line["record"]))
        if self._path is not None:
            write_text(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
        return found


def _name(line: Line) -> str:
    return f"{line['record']} {line.get('turn', 1)}"


@dataclass(frozen=True)
class Interval:
    """A score with the bootstrap's 95 % interval, over so many questions."""

    score: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        metrics: By name.
        bad: How many records could not be asked, by reason.
        named: Each of them, with why.
        seconds: How long answering took.
        lines: Of all records.
        more: Further scores, of parts of a set.
    """

    metrics: Mapping[str, Interval]
    questions: int
    bad: Mapping[str, int] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    seconds: float = 0.0
    lines: Sequence[Line] = ()
    more: Mapping[str, float] = field(default_factory=dict)

    def scores(self) -> dict[str, float]:
        """{"anls": ..., "anls_low": ..., "anls_high": ..., "n": questions, "bad": records}."""
        found: dict[str, float] = {}
        for name, one in self.metrics.items():
            found |= {name: one.score, f"{name}_low": one.low, f"{name}_high": one.high}
        return {**found, **self.more, "n": self.questions, "bad": sum(self.bad.values())}


def interval(scores: Sequence[Score], seed: int = 0) -> Interval:
    """All points over all they are out of, and the 2.5th and 97.5th percentile of that over `RESAMPLES` resamples."""
    points, of = np.array(scores, dtype=np.float64).reshape(-1, 2).T
    if not of.sum():
        return Interval(float("nan"), float("nan"), float("nan"), len(scores))
    picked = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = points[picked].sum(1) / of[picked].sum(1)
    low, high = np.nanpercentile(shares, [2.5, 97.5])
    return Interval(float(points.sum() / of.sum()), float(low), float(high), len(scores))


def summarise(lines: Sequence[Line], scorers: Mapping[str, Scorer], seed: int = 0) -> Summary:
    """What lines of records come to. Scores are made anew of the answers, as they were given."""
    good = [line for line in lines if "error" not in line]
    # a record that cannot be read costs all of its questions, and is one
    bad = {line["record"]: line for line in lines if "error" in line}
    metrics = {}
    for name, scorer in scorers.items():
        found = [score for line in good if (score := scorer(line)) is not None]
        if any(score.of for score in found):
            metrics[name] = interval(found, seed)
    return Summary(
        metrics,
        len(good),
        Counter(line["error"] for line in bad.values()),
        tuple(f"{record}: {line['why']}" for record, line in bad.items()),
        sum(line["seconds"] for line in good),
        lines,
    )


def by_metric(name: str) -> Scorer:
    """Scores a line by a metric of `METRICS`."""
    metric = METRICS[name]
    return lambda line: metric(line["answer"], line["references"], line["question"])


def score_questions(
    questions: Iterator[Question | BadQuestion],
    answers: Answers,
    scorers: Mapping[str, Scorer],
    file: RecordsFile,
    *,
    watch: Watch | None = None,
    judge: Callable[[Line], float] | None = None,
    progress: OnProgress | None = None,
    spread: Spread | None = None,
) -> list[Line]:
    """Asks all questions and scores the answers.

    Questions wait in blocks, in which they are sorted by cost. A batch of which the file has all answers is not asked
    again; batches are the same whenever a run is gone on with, and so are the answers.

    Args:
        questions: What is asked.
        answers: What answers.
        scorers: By name.
        file: Where lines are kept.
        watch: Captions a live record.
        judge: Gives every answer a number, which stands in its line as `judge`.
        progress: Is told the number of lines so far.
        spread: Has batches answered elsewhere, as `ask` does; here if None.

    Returns:
        The lines of all records, in the order of the data.
    """
    told = progress or (lambda done: None)

    def left() -> Iterator[list[Question]]:
        for block, bad in _blocks(questions):
            file.add([{"record": one.record, **_why(one.bad)} for one in bad])
            live = [one for one in block if one.is_live and watch is not None]
            asked = answers.batches([one for one in block if not live or not one.is_live])
            for batch in (*asked, *([one] for one in live)):
                if all(f"{one.record} {one.turn}" in file.lines for one in batch):
                    told(len(file.lines))
                else:
                    yield batch

    for lines in map(partial(ask, answers, watch), left()) if spread is None else spread(left()):
        for line in lines:
            if "error" not in line:
                line |= {} if judge is None else {"judge": judge(line)}
                scores = {name: score for name, scorer in scorers.items() if (score := scorer(line)) is not None}
                line["scores"] = {name: round(one.share, 6) if one.of else None for name, one in scores.items()}
        file.add(lines)
        told(len(file.lines))
    return file.finish()


def ask(answers: Answers, watch: Watch | None, batch: Sequence[Question]) -> list[Line]:
    """The lines of a batch of questions, or of one live record, but for their scores; JSON-ready."""
    began = perf_counter()
    if watch is not None and batch[0].is_live:
        given = [_watched(watch, batch[0])]
    else:
        given = [{"answer": one} if isinstance(one, str) else one for one in answers.answer(batch)]
    seconds = round((perf_counter() - began) / len(batch), 4)
    return [_line(one, answer, seconds) for one, answer in zip(batch, given, strict=True)]


def _watched(watch: Watch, question: Question) -> Line | BadRecord:
    try:
        return watch(question)
    except BadRecord as bad:
        return bad


def _line(question: Question, answer: Line | BadRecord, seconds: float) -> Line:
    """A line but for its scores."""
    line: Line = {"index": question.index, "record": question.record}
    if question.turn > 1:
        line["turn"] = question.turn
    if isinstance(answer, BadRecord):
        return line | _why(answer)
    line |= {"question": question.text, "references": list(question.references), **answer, "seconds": seconds}
    return line | ({"row": dict(question.row)} if question.row else {})


def _why(bad: BadRecord) -> Line:
    return {"error": bad.reason, "why": str(bad)}


def _blocks(questions: Iterator[Question | BadQuestion]) -> Iterator[tuple[list[Question], list[BadQuestion]]]:
    """Questions in blocks that fit into memory, the pictures that stand in the data themselves counted."""
    block: list[Question] = []
    bad: list[BadQuestion] = []
    held = 0
    for one in questions:
        if isinstance(one, BadQuestion):
            bad.append(one)
            continue
        block.append(one)
        held += sum(len(picture.source) for picture in one.pictures if isinstance(picture.source, bytes))
        if len(block) >= BLOCK_QUESTIONS or held >= BLOCK_BYTES:
            yield block, bad
            block, bad, held = [], [], 0
    if block or bad:
        yield block, bad
