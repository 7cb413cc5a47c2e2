"""What an image token tells of the texts on its page, in tokens of a text model.

Three things, each as ids that are looked up in a table of codes: the tokens that begin in it; the three that stand
before the first of these, so that who has said them finds the next; and what the text as a whole may be asked by, its
tags. Of these there are three kinds: what it is called (of a form's value the name to its left, of a table's cell
those of its row and its column, of a receipt's price its line's and "price"; a name a letter off a word as that word),
where it stands, and what is below it. They are compared together, so that of a row's cells the right one is found.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_lowercase

import numpy as np

from casa.vision.page_reading import TextRun

BEFORE = 3  # tokens told that stand before the first that begins in an image token
BEGUN = 3  # tokens told that begin in one image token, at most
TAGS = ((8, 8), (8, 3, 2, 8), (8,))
"""Groups of tokens that a text has as tags, how many at most: what it is called by, its line's name, and the head of
its column or, without one, what kind of thing it is; where it stands, the text to its left, its line's number, whether
that is the first or the last, the text above it; and, as few are asked for by it, the text below it."""
TAG_IDS = sum(map(sum, TAGS))  # ids of tags; behind them are the tokens before, and those that begin
SLOTS = (*TAGS, *[(1,)] * (BEFORE + BEGUN))
"""Groups of tokens by slot: an image token has one code for each slot, to which each group adds as much."""
IDS = sum(map(sum, SLOTS))  # ids of an image token
NOTHING = -1  # in place of a token's id: there is none

SAME_LINE = 1.0  # cells between the middles of two texts of one line, at most
NUMBERED = 20  # lines that are told by their numbers
TABLE = 3  # texts on a line of a table, at least
LETTERS = 9  # of a price, a date or the like, at most
MISREAD = 4  # letters of a word that may be another one misread, at least
# dots that lead to a price; how many of a thing before it, or in brackets behind it
_APART = re.compile(
    r"\s*(?:[._–-] ?){5,}\s*|(?:(?<=^\d)|(?<=^\d\d)) ?(?:x |× ?)(?=[^\W\d_])"
    r"|\s*\((?<=\s\()(?=\d\d?\)$)|(?:(?<=\s\(\d)|(?<=\s\(\d\d))\)$"
)
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
ORDINALS = _ORDINALS.split()
KINDS = {
    r"\d{4}-\d\d?-\d\d?|\b\d\d?([./])\d\d?\1\d\d|\b(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* \d": " date",
    r"\d:\d\d": " time",
    r"^\W?[$€£]|[$€£]$|^\d[\d.,]*[.,]\d\d$": " price cost much",
    r"^\d{1,3}$": " many quantity",
    r"^(?!\d{4}-)[+(]?\d[\d() -]{5,}$": " phone",
    r"\d ?%$": " percent",
}
"""Forms of texts that are of some kind, and words by which one asks for that."""
Encode = Callable[[str], Sequence[tuple[int, tuple[int, int]]]]
"""A text to its tokens: the id of each, and where in the text it begins and ends."""


@dataclass(frozen=True)
class PageWords:
    """ids: int32 (rows, columns, `IDS`), NOTHING where there is no token.

    spots: for each text the image token in which each of its tokens begins, in reading order, and the number among
    those that begin there; (-1, -1) for one that found no room. The end of the text is its last.
    """

    ids: np.ndarray
    spots: list[list[tuple[int, int]]]


def words_of_page(
    runs: Sequence[TextRun],
    grid: tuple[int, int],
    block: tuple[int, int],
    encode: Encode,
    end: int | None = None,
    known: frozenset[str] = frozenset(),
) -> PageWords:
    """Which tokens of a text model each image token tells.

    A text begins after a line break, as an answer does, and ends with `end`, which stands at its last character.

    Args:
        runs: The page's texts.
        grid: Rows and columns of image tokens.
        block: Rows and columns of cells in one.
        encode: The text model's tokenizer.
        end: The token that ends an answer; a line break if None.
        known: Words, as `known_words` has them, of which misread ones remind.
    """
    ids = np.full((*grid, IDS), NOTHING, dtype=np.int32)
    line_break = encode("\n")[0][0]
    end = line_break if end is None else end
    spots: list[list[tuple[int, int]]] = []
    for run, tags in zip(runs, tags_of(runs, encode, known), strict=True):
        before, last = [*[NOTHING] * (BEFORE - 1), line_break], len(run.text) - 1
        spots.append([])
        for token, (first, stop) in [*encode(run.text), (end, (last, last + 1))]:
            first = min(first + len(run.text[first:stop]) - len(run.text[first:stop].lstrip()), last)
            row = min(max(int((run.rows[first] + 0.5) // block[0]), 0), grid[0] - 1)
            column = min(max(int((run.columns[first] + 0.5) // block[1]), 0), grid[1] - 1)
            told = ids[row, column]
            begun = told[TAG_IDS + BEFORE :]
            place = int((begun != NOTHING).sum())
            if place < BEGUN:
                if place == 0:
                    told[:TAG_IDS] = tags
                    told[TAG_IDS : TAG_IDS + BEFORE] = before
                begun[place] = token
            spots[-1].append((row * grid[1] + column, place) if place < BEGUN else (-1, -1))
            before = [*before[1:], token]
    return PageWords(ids, spots)


def apart(runs: Sequence[TextRun]) -> list[TextRun]:
    """Texts of which each is one thing: "Tea .... 4.10", "2 x Tea" and "Tea (2)" are two."""
    pieces = []
    for run in runs:
        cuts = [0, *(at for cut in _APART.finditer(run.text) for at in cut.span()), len(run.text)]
        ends = zip(cuts[::2], cuts[1::2], strict=True)
        pieces += [TextRun(run.text[a:b], run.rows[a:b], run.columns[a:b]) for a, b in ends if a < b]
    return pieces


def tags_of(runs: Sequence[TextRun], encode: Encode, known: frozenset[str] = frozenset()) -> np.ndarray:
    """int64 (texts, TAG_IDS): tokens that each text may be asked for by, NOTHING where there are no more."""
    found = np.full((len(runs), TAG_IDS), NOTHING, dtype=np.int64)
    if len(runs) < 2:
        return found
    lines, names = _lines(runs), [_name(run.text, encode, known) for run in runs]
    kinds = [_kind(run.text, encode) for run in runs]
    sizes = [most for slot in TAGS for most in slot]
    starts = np.cumsum((0, *sizes[:-1]))
    for at, line in enumerate(lines):
        for place, number in enumerate(line):
            first, left = _called(runs, line, place), line[1:place][-1:]
            head = _head(runs, lines[: at + 1], number)
            above, below = (_over(runs, some, number) for some in (lines[at - 1 : at], lines[at + 1 : at + 2]))
            beside = [names[other[0]] if other else [] for other in (first, head, left, above, below)]
            if kinds[number] == kinds[[number, *head][-1]] != []:  # no head is what its column is made of
                beside[1] = kinds[number]
            groups = [*beside[:3], *_numbers(at, len(lines), encode), *beside[3:]]
            for start, most, tokens in zip(starts, sizes, groups, strict=True):
                found[number, start : start + len(tokens[:most])] = tokens[:most]
    return found


def _called(runs: Sequence[TextRun], line: list[int], place: int) -> list[int]:
    """The name beside a text, where its line has names and values in turns; else that of the line."""
    named = [number for number in line if sum(map(str.isalpha, runs[number].text)) > 1]
    are_names = [number in named and not any(map(str.isdigit, runs[number].text)) for number in line[::2]]
    if place % 2 and len(line) % 2 == 0 and all(are_names):
        return [line[place - 1]]
    return [number for number in named[:1] if number != line[place]] if named else line[: min(place, 1)]


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


def _name(text: str, encode: Encode, known: frozenset[str]) -> list[int]:
    """Tokens by which someone would name a text: as it is written, in small letters, and as it may be meant."""
    words = {word for word in re.findall(r"[a-z]+", text.lower()) if len(word) >= MISREAD and word not in known}
    meant = [f" {one}" for word in sorted(words) for one in _meant(word, known)]
    forms = (" " + text, " " + text.lower(), *meant)
    pieces = [(token, form[first:stop]) for form in forms for token, (first, stop) in encode(form)]
    return list(dict.fromkeys(plain_token(*piece, encode) for piece in pieces if any(map(str.isalnum, piece[1]))))


def _kind(text: str, encode: Encode) -> list[int]:
    """Tokens of what one asks for to be told a text of its form: a price, a date, how many."""
    words = "".join(words for form, words in KINDS.items() if re.search(form, text))
    return [token for token, _ in encode(words)] if sum(map(str.isalpha, text)) <= LETTERS else []


@lru_cache(maxsize=4096)  # frames of a film have the same words
def _meant(word: str, known: frozenset[str]) -> list[str]:
    """Up to two known words that are one letter off."""
    cut = [(word[:at], word[at:]) for at in range(len(word) + 1)] if known else []
    near = {left + one + right[out:] for left, right in cut for one in ("", *ascii_lowercase) for out in (0, 1)}
    return sorted(near & known)[:2]


def known_words(vocabulary: Iterable[str]) -> frozenset[str]:
    """Words that are one token behind a blank, of a byte-level or SentencePiece tokenizer's tokens."""
    words = (token[1:].lower() for token in vocabulary if token[:1] in "Ġ▁" and token[1:].isascii())
    return frozenset(word for word in words if len(word) >= MISREAD - 1 and word.isalpha())


def plain_token(token: int, text: str, encode: Encode) -> int:
    """The token that tags have for one: that of its text in small letters behind a blank, if there is such a token."""
    found = encode(" " + text.strip().lower())
    return found[0][0] if len(found) == 1 else token


def _numbers(line: int, count: int, encode: Encode) -> list[list[int]]:
    """Of a line's number, from 0: its name and its digits; and whether it is the first or the last."""
    if count < 2:
        return [[], []]
    number = [f" {ORDINALS[line]}"] if line < NUMBERED else []
    ends = [" top"] if line == 0 else [" last", " bottom"] if line == count - 1 else []
    return [
        list(dict.fromkeys(token for name in names for token, _ in encode(name)))
        for names in ([*number, str(line + 1)], ends)
    ]
