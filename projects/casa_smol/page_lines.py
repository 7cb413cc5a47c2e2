"""Pages as lines of text, and what a page's questions ask for, looked up in them: how other readers answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from casa.vision.page_words import ORDINALS
from projects.casa_smol.metrics import distance
from projects.casa_smol.tasks.lines import READ_AFTER, READ_BEFORE, READ_LAST, READ_NUMBERED

_PLACES = {name: place for place, name in enumerate(ORDINALS)}
_SLOTS = {"{n}": r"(?P<n>\d+)", "{nth}": rf"(?P<nth>{'|'.join(ORDINALS)})", "{line}": r"(?P<line>.*)"}


@dataclass(frozen=True)
class Piece:
    """A piece of writing. start, end: x and y of the middles of its left and right side, in px, as is its height."""

    text: str
    start: tuple[float, float]
    end: tuple[float, float]
    height: float


def in_lines(pieces: Sequence[Piece]) -> list[str]:
    """The lines of a page from above: from the left, each piece goes behind the one that ends at its height."""
    lines: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda one: one.start[0]):
        near = [
            (abs(line[-1].end[1] - piece.start[1]), number)
            for number, line in enumerate(lines)
            if abs(line[-1].end[1] - piece.start[1]) <= min(line[-1].height, piece.height) / 2
            and line[-1].end[0] <= piece.start[0] + piece.height / 2
        ]
        if near:
            lines[min(near)[1]].append(piece)
        else:
            lines.append([piece])
    lines.sort(key=lambda line: sum(one.start[1] + one.end[1] for one in line) / len(line))
    return [" ".join(one.text for one in line) for line in lines]


def _pattern(wording: str) -> str:
    parts = re.split(r"(\{\w+\})", wording.rstrip("?."))
    return "".join(_SLOTS.get(part, re.escape(part)) for part in parts) + r"[?.]?"


_KINDS = {"last": READ_LAST, "numbered": READ_NUMBERED, "after": READ_AFTER, "before": READ_BEFORE}
_WORDINGS = {
    kind: [re.compile(_pattern(wording), re.IGNORECASE | re.DOTALL) for wording in wordings]
    for kind, wordings in _KINDS.items()
}


def asked_for(question: str) -> tuple[str, dict[str, str]] | None:
    """Which line a question asks for, as ("after", {"line": ...}); None if it asks for something else."""
    for kind, patterns in _WORDINGS.items():
        for pattern in patterns:
            if found := pattern.fullmatch(question):
                return kind, found.groupdict()
    return None


def answer_from(lines: Sequence[str], question: str) -> str:
    """The line that a question asks for, "" if there is none."""
    asked = asked_for(question)
    if asked is None:
        raise ValueError(f"{question!r} asks for no line.")
    kind, names = asked
    lines = without_numbers(lines)
    if kind == "last":
        place = len(lines) - 1
    elif kind == "numbered":
        place = int(names["n"]) - 1 if "n" in names else _PLACES[names["nth"].lower()]
    else:
        unlike = [distance(line, names["line"]) for line in lines]
        place = unlike.index(min(unlike)) + (1 if kind == "after" else -1) if lines else -1
    return lines[place] if 0 <= place < len(lines) else ""


def without_numbers(lines: Sequence[str]) -> list[str]:
    """Lines without their numbers, where most begin with their own."""
    numbered = [re.match(rf"{number}\s?[.,:]\s*", line) for number, line in enumerate(lines, 1)]
    if sum(map(bool, numbered)) * 2 <= len(lines):
        return list(lines)
    return [re.sub(r"^\d+\s?[.,:]\s*", "", line) for line in lines]
