"""What an image token tells of the texts on its page, in tokens of a text model.

Three things, each as ids that are looked up in a table of codes: the tokens that begin in it; the two that stand before
the first of these, so that who has said them finds the next; and what the text as a whole may be asked by, its tags:
the number of its line, the words to its left (of a form: its name), those above it and those below it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from casa.vision.page_reading import TextRun

BEFORE = 2
"""How many tokens before the first that begins in an image token are told."""
BEGUN = 3
"""How many of a text model's tokens that begin in one image token are told."""
TAGS = (5, 12, 12, 8)
"""How many tokens a text has as tags, at most: of its line's number, of what is to its left, above it and below it."""
SLOTS = (*TAGS, *[1] * (BEFORE + BEGUN))
"""Tokens by slot: an image token has one code for each slot, that of its tokens together."""
NOTHING = -1
"""In place of a token's id: there is none."""

SAME_LINE = 1.0  # cells between the middles of two texts of one line, at most
NUMBERED = 20  # lines that are told by their numbers
TABLE = 3  # texts on a line of a table, at least
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
ORDINALS = _ORDINALS.split()

Encode = Callable[[str], Sequence[tuple[int, tuple[int, int]]]]
"""A text to its tokens: the id of each, and where in the text it begins and ends."""


@dataclass(frozen=True)
class PageWords:
    """ids: int64 (rows, columns, sum of `SLOTS`), NOTHING where there is no token.

    spots: for each text the image token in which each of its tokens begins, in reading order, and the number among
    those that begin there; (-1, -1) for one that found no room. The end of the text is its last.
    """

    ids: np.ndarray
    spots: list[list[tuple[int, int]]]


def words_of_page(
    runs: Sequence[TextRun], grid: tuple[int, int], block: tuple[int, int], encode: Encode, end: int | None = None
) -> PageWords:
    """Which tokens of a text model each image token tells.

    A text begins after a line break, as an answer does, and ends with `end`, which stands at its last character.

    Args:
        runs: The page's texts.
        grid: Rows and columns of image tokens.
        block: Rows and columns of cells in one.
        encode: The text model's tokenizer.
        end: The token that ends an answer; a line break if None.
    """
    ids = np.full((*grid, sum(SLOTS)), NOTHING, dtype=np.int64)
    line_break = encode("\n")[0][0]
    end = line_break if end is None else end
    spots: list[list[tuple[int, int]]] = []
    for run, tags in zip(runs, tags_of(runs, encode), strict=True):
        before, last = [NOTHING, line_break], len(run.text) - 1
        spots.append([])
        for token, (first, stop) in [*encode(run.text), (end, (last, last + 1))]:
            first = min(first + len(run.text[first:stop]) - len(run.text[first:stop].lstrip()), last)
            row = min(max(int((run.rows[first] + 0.5) // block[0]), 0), grid[0] - 1)
            column = min(max(int((run.columns[first] + 0.5) // block[1]), 0), grid[1] - 1)
            told = ids[row, column]
            begun = told[sum(TAGS) + BEFORE :]
            place = int((begun != NOTHING).sum())
            if place < BEGUN:
                if place == 0:
                    told[: sum(TAGS)] = tags
                    told[sum(TAGS) : sum(TAGS) + BEFORE] = before
                begun[place] = token
            spots[-1].append((row * grid[1] + column, place) if place < BEGUN else (-1, -1))
            before = [before[-1], token]
    return PageWords(ids, spots)


def tags_of(runs: Sequence[TextRun], encode: Encode) -> np.ndarray:
    """int64 (texts, sum of `TAGS`): tokens that each text may be asked for by, NOTHING where there are no more."""
    found = np.full((len(runs), sum(TAGS)), NOTHING, dtype=np.int64)
    if len(runs) < 2:
        return found
    lines, names = _lines(runs), [_name(run.text, encode) for run in runs]
    for at, line in enumerate(lines):
        for place, number in enumerate(line):
            named = [line[0], line[place - 1]] if place else []  # the first text of its line, and the one before it
            above = [*_head(runs, lines[: at + 1], number), *_over(runs, lines[at - 1 : at], number)]
            around = (named, above, _over(runs, lines[at + 1 : at + 2], number))
            kinds = [_numbers(at, len(lines), encode)]
            kinds += [_asked(names, texts, most) for texts, most in zip(around, TAGS[1:], strict=True)]
            for first, most, tokens in zip(np.cumsum((0, *TAGS)), TAGS, kinds, strict=False):
                found[number, first : first + len(tokens[:most])] = tokens[:most]
    return found


def _lines(runs: Sequence[TextRun]) -> list[list[int]]:
    """Numbers of the texts of each line, from the top and from the left."""
    lines: list[list[int]] = []
    for number in sorted(range(len(runs)), key=lambda number: runs[number].rows.mean()):
        if lines and abs(runs[lines[-1][0]].rows.mean() - runs[number].rows.mean()) <= SAME_LINE:
            lines[-1].append(number)
        else:
            lines.append([number])
    return [sorted(line, key=lambda number: runs[number].columns[0]) for line in lines]


def _over(runs: Sequence[TextRun], lines: list[list[int]], number: int) -> list[int]:
    """The first text of the line, if there is one, that stands over or under this one."""
    left, right = runs[number].columns[[0, -1]]
    spans = {other: runs[other].columns for line in lines for other in line}
    return [other for other, columns in spans.items() if columns[0] <= right and columns[-1] >= left][:1]


def _head(runs: Sequence[TextRun], lines: list[list[int]], number: int) -> list[int]:
    """The head of the column that this text of the last line stands in, if that is one of a table."""
    first = len(lines)
    while first and len(lines[first - 1]) >= TABLE:
        first -= 1
    return _over(runs, lines[first : first + 1], number) if first < len(lines) - 1 else []


def _asked(names: Sequence[list[int]], texts: list[int], most: int) -> list[int]:
    """Tokens by which someone would name these texts, as many of each."""
    chosen = list(dict.fromkeys(texts))
    return list(dict.fromkeys(token for number in chosen for token in names[number][: most // len(chosen)]))


def _name(text: str, encode: Encode) -> list[int]:
    """Tokens by which someone would name a text: as it is written, and in small letters."""
    forms = (" " + text, " " + text.lower())
    pieces = [(token, form[first:stop]) for form in forms for token, (first, stop) in encode(form)]
    return list(dict.fromkeys(plain_token(*piece, encode) for piece in pieces if any(map(str.isalnum, piece[1]))))


def plain_token(token: int, text: str, encode: Encode) -> int:
    """The token that tags have for one: that of its text in small letters behind a blank, if there is such a token."""
    found = encode(" " + text.strip().lower())
    return found[0][0] if len(found) == 1 else token


def _numbers(line: int, count: int, encode: Encode) -> list[int]:
    """Of a line's number, from 0: its name, whether it is the last, and its digits."""
    names = [f" {ORDINALS[line]}"] if line < NUMBERED else []
    names += [" top"] if line == 0 else []
    names += [" last", " bottom"] if line == count - 1 else []
    names += [str(line + 1)]
    return list(dict.fromkeys(token for name in names if count > 1 for token, _ in encode(name)))
