"""How an answer is judged: exactly, by likeness (ANLS), by nearness of numbers, by characters."""

import re
from collections.abc import Sequence
from typing import Any

from casa.evaluation.metrics import Score
from casa.evaluation.scoring import interval

# what the goal of each task is measured by; all others by "exact"
MEASURES = {"line": "verbatim", "page": "verbatim", "chart": "relaxed"}
LEAST_LIKENESS = 0.5
RELAXED = 0.05
NORMAL = 1.959964  # standard deviations that hold 95 % of a normal distribution


def distance(one: str, two: str) -> int:
    """Least number of characters to put in, take out or change."""
    row = list(range(len(two) + 1))
    for place, a in enumerate(one, 1):
        before, row[0] = row[0], place
        for other, b in enumerate(two, 1):
            before, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, before + (a != b))
    return row[-1]


def verbatim(said: str, answers: Sequence[str]) -> float:
    """1.0 if every character is right, blanks at the ends aside."""
    return float(any(tidy(said) == tidy(answer) for answer in answers))


def exact(said: str, answers: Sequence[str]) -> float:
    """1.0 if an answer is given, whatever its case and the stop behind it."""
    return float(any(plain(said) == plain(answer) for answer in answers))


def contained(said: str, answers: Sequence[str]) -> float:
    """1.0 if an answer is given in a sentence, too: as `exact` compares texts, between words."""
    text, wanted = plain(said), filter(None, map(plain, answers))
    return float(any(re.search(rf"(?<![\w-])(?<!\d[.,:/]){re.escape(one)}(?!\w|[.,:/-]\d)", text) for one in wanted))


def anls(said: str, answers: Sequence[str]) -> float:
    """1 - distance / length of the likest answer, 0 below one half (average normalised Levenshtein similarity)."""
    found = 0.0
    for answer in answers:
        one, two = plain(said), plain(answer)
        found = max(found, 1 - distance(one, two) / max(len(one), len(two), 1))
    return found if found >= LEAST_LIKENESS else 0.0


def relaxed(said: str, answers: Sequence[str]) -> float:
    """1.0 for a number within 5 % of an answer, else as `exact`: the usual measure of charts."""
    value = _number(said)
    for answer in answers:
        wanted = _number(answer)
        if value is not None and wanted is not None and abs(value - wanted) <= RELAXED * abs(wanted):
            return 1.0
    return exact(said, answers)


def characters(said: str, answers: Sequence[str]) -> tuple[int, int]:
    """Errors and length, against the nearest answer."""
    errors = {answer: distance(tidy(said), tidy(answer)) for answer in answers}
    best = min(errors, key=lambda answer: errors[answer] / max(1, len(answer)))
    return errors[best], len(tidy(best))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share of `count` questions (Wilson 1927), each asked by itself."""
    if not count:
        return 0.0, 1.0
    square = NORMAL**2 / count
    middle = (share + square / 2) / (1 + square)
    half = (share * (1 - share) * square + square**2 / 4) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def scores(task: str, said: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """A task's own measure, "contained", ANLS, and the error rate of characters, with 95 % intervals.

    said: texts, with their answers.
    """
    name = MEASURES.get(task, "exact")
    right = [JUDGES[name](*one) for one in said]
    errors = interval([Score(*characters(*one)) for one in said])
    return {
        **share(name, right),
        **share("contained", [max(is_right, contained(*one)) for is_right, one in zip(right, said, strict=True)]),
        "anls": round(sum(anls(*one) for one in said) / max(1, len(said)), 4),
        "character_error_rate": round(errors.score, 4),
        "character_error_rate_interval": [round(errors.low, 4), round(errors.high, 4)],
    }


def share(name: str, right: Sequence[float]) -> dict[str, Any]:
    """A share under its name, with its interval and the number of questions."""
    found = sum(right) / max(1, len(right))
    ends = [round(end, 4) for end in wilson(found, len(right))]
    return {name: round(found, 4), f"{name}_interval": ends, "questions": len(right)}


def tidy(text: str) -> str:
    """With single blanks between words, and none at the ends."""
    return " ".join(text.split())


def plain(text: str) -> str:
    """As `exact` compares texts."""
    return tidy(text).casefold().rstrip(". ")


def _number(text: str) -> float | None:
    found = re.fullmatch(r"[^\d-]{0,3}(-?\d[\d,]*\.?\d*)\s*%?\.?", text.strip())
    return float(found[1].replace(",", "")) if found else None


JUDGES = {"exact": exact, "relaxed": relaxed, "verbatim": verbatim}
