"""How an answer is judged: exactly, by likeness (ANLS), by nearness of numbers, by characters."""

import re
from collections.abc import Sequence

# what the goal of each task is measured by; all others by "exact"
MEASURES = {"line": "verbatim", "page": "verbatim", "chart": "relaxed"}
LEAST_LIKENESS = 0.5
RELAXED = 0.05


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
    return float(any(_tidy(said) == _tidy(answer) for answer in answers))


def exact(said: str, answers: Sequence[str]) -> float:
    """1.0 if an answer is given, whatever its case and the stop behind it."""
    return float(any(_plain(said) == _plain(answer) for answer in answers))


def anls(said: str, answers: Sequence[str]) -> float:
    """1 - distance / length of the likest answer, 0 below one half (average normalised Levenshtein similarity)."""
    found = 0.0
    for answer in answers:
        one, two = _plain(said), _plain(answer)
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
    errors = {answer: distance(_tidy(said), _tidy(answer)) for answer in answers}
    best = min(errors, key=lambda answer: errors[answer] / max(1, len(answer)))
    return errors[best], len(_tidy(best))


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    return _tidy(text).casefold().rstrip(". ")


def _number(text: str) -> float | None:
    found = re.fullmatch(r"[^\d-]{0,3}(-?\d[\d,]*\.?\d*)\s*%?\.?", text.strip())
    return float(found[1].replace(",", "")) if found else None
