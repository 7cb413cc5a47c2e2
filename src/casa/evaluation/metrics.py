"""Scores of answers by name (`METRICS`), and word error rate of captions.

Every metric gives points out of a number: 1 out of 1 for a right answer, edits out of the reference's words for a word
error rate. A set's score is all points over all numbers, so that rates are those of the corpus.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from casa.errors import UserError
from casa.evaluation.vqa_accuracy import vqa_accuracy
from casa.settings import near


class Score(NamedTuple):
    """What an answer gets, and out of how much."""

    points: float
    of: float = 1.0

    @property
    def share(self) -> float:
        """Points over the number they are out of; 0 of nothing is 0, and more is infinite."""
        return self.points / self.of if self.of else (float("inf") if self.points else 0.0)


Metric = Callable[[str, Sequence[str], str], Score]
"""From an answer, its references (one or more) and its question to a score."""


def normalise(text: str) -> str:
    """`text` as answers are compared: NFKC, lower case, single blanks, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".!").rstrip()


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers equal to their truth after `normalise`; ValueError for none, or unequal lengths."""
    if len(answers) != len(truths):
        raise ValueError(f"{len(answers)} answers cannot be compared with {len(truths)} truths.")
    if not truths:
        raise ValueError("there are no answers to score.")
    right = sum(normalise(a) == normalise(t) for a, t in zip(answers, truths, strict=True))
    return right / len(truths)


def words(captions: Iterable[str]) -> list[str]:
    """All words of a stream's captions in order; an empty caption has none."""
    return [word for caption in captions for word in normalise(caption).split()]


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions of items that turn one sequence into the other."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, given in enumerate(hypothesis, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != given))
            diagonal, row[j] = row[j], best
    return row[-1]


def word_error_rate(streams: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """Corpus word error rate of (true captions, given captions) per stream: all edits over all true words.

    0 is perfect, 1 is silence, and more is possible for a model that says too much. ValueError if the true
    captions hold no word.
    """
    edits = total = 0
    for truth, given in streams:
        reference = words(truth)
        edits += edit_distance(reference, words(given))
        total += len(reference)
    if total == 0:
        raise ValueError("the true captions hold no word, so there is no word error rate.")
    return edits / total


def exact(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Whether the answer is one of the references, after `normalise`."""
    return Score(float(normalise(answer) in map(normalise, references)))


def contains(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Whether one of the references stands in the answer, after `normalise`: OCRBench's rule."""
    return Score(float(any(normalise(reference) in normalise(answer) for reference in references)))


def anls(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648): DocVQA's and InfoVQA's metric.

    1 - edits / length of the longer text, of the best reference; 0 if that is below one half. Case does not count,
    nor how many blanks stand together.
    """
    given = _blanks(answer).lower()

    def similarity(reference: str) -> float:
        wanted = _blanks(reference).lower()
        longest = max(len(wanted), len(given))
        found = 1 - edit_distance(wanted, given) / longest if longest else 1.0
        return found if found >= 0.5 else 0.0

    return Score(max(map(similarity, references)))


def relaxed(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Relaxed accuracy (Masry et al. 2022, arXiv 2203.10244, section 5.1), ChartQA's metric: a number is right within
    5 % of the true one, anything else if it is the same but for case. 25% is 0.25."""

    def right(reference: str) -> bool:
        given, wanted = _number(answer), _number(reference)
        if given is None or not wanted:
            return answer.strip().lower() == reference.strip().lower()
        return abs(given - wanted) <= 0.05 * abs(wanted)

    return Score(float(any(map(right, references))))


def _number(text: str) -> float | None:
    text = text.strip()
    with suppress(ValueError):
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    return None


def vqa(answer: str, references: Sequence[str], question: str = "") -> Score:
    """VQA accuracy (`casa.evaluation.vqa_accuracy`); references are the answers of all people, equal ones too."""
    return Score(vqa_accuracy(answer, references))


def cer(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Character error rate: edits over the reference's characters, of the nearest reference. Case counts."""
    return _nearest(_blanks(answer), map(_blanks, references))


def wer(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Word error rate: edits over the reference's words, of the nearest reference. Case and marks count."""
    return _nearest(answer.split(), map(str.split, references))


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _nearest(given: Sequence[str], references: Iterable[Sequence[str]]) -> Score:
    scores = (Score(edit_distance(wanted, given), len(wanted)) for wanted in references)
    return min(scores, key=lambda score: score.share)


# an option's line: A. text, (A) text, A) text, A: text
_OPTION = re.compile(r"^\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(\S.*?)\s*$", re.MULTILINE)
_SAID = re.compile(r"(?:answer|option|choice)(?:\s+is|\s*:)?[\s:*\"']*\(?([A-Z])(?![A-Za-z'])")
_LED = re.compile(r"\(?([A-Z])(?:[.):]|\s*$)")
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")


def options_of(question: str) -> dict[str, str]:
    """The options that stand in a question, a line each, by their letters."""
    return {found[1] or found[2]: found[3] for found in _OPTION.finditer(question)}


def choice_of(answer: str, options: dict[str, str] | None = None) -> str | None:
    """The letter of the option that an answer chooses, None if it chooses none.

    In this order: a letter and nothing else, "the answer is B", a letter with a mark in front, the last (B), the text
    of one option and of no other, the last letter that stands alone.
    """
    options, text = options or {}, answer.strip().strip("*\"'").strip()
    known = set(options) or set(string.ascii_uppercase)
    bare = text.strip("().,:;!? ")
    if len(bare) == 1 and bare.upper() in known:
        return bare.upper()
    said, led, brackets = _SAID.findall(text), _LED.match(text), _IN_BRACKETS.findall(text)
    for letter in (*said[-1:], *([led[1]] if led else []), *brackets[-1:]):
        if letter in known:
            return letter
    spoken = normalise(text)
    named = [letter for letter, option in options.items() if normalise(option) == spoken]
    named = named or [letter for letter, option in options.items() if normalise(option) in spoken]
    if len(named) == 1:
        return named[0]
    # "A cat" begins with an article, and "I" is a word
    alone = [found for found in _ALONE.findall(text) if found in known - {"A", "I"}]
    return alone[-1] if alone else None


def mcq(answer: str, references: Sequence[str], question: str = "") -> Score:
    """Whether the answer chooses the right option: its letter in any usual form, or its text.

    References are letters or texts of options; options are found in the question, a line each ("A. cat").
    """
    options = options_of(question)
    chosen = choice_of(answer, options)
    wanted = {choice_of(reference, options) or normalise(reference) for reference in references}
    return Score(float((normalise(answer) if chosen is None else chosen) in wanted))


METRICS: dict[str, Metric] = {
    "anls": anls,
    "relaxed": relaxed,
    "exact": exact,
    "vqa": vqa,
    "cer": cer,
    "wer": wer,
    "contains": contains,
    "mcq": mcq,
}
LIVE = "live"  # among metrics: those of `casa.evaluation.live_captions`, of live records


def check_metrics(names: Iterable[str]) -> list[str]:
    """The names in order without repeats; UserError for one that is no metric, or for none."""
    chosen = list(dict.fromkeys(name.strip() for name in names))
    for name in chosen:
        if name not in (*METRICS, LIVE):
            raise UserError(f"There is no metric {name!r}; {near(name, (*METRICS, LIVE), 'choose from')}")
    if not chosen:
        raise UserError(f"No metric was named; choose from {', '.join((*METRICS, LIVE))}.")
    return chosen
