"""Scores: exact match of answers, and word error rate of captions."""

import unicodedata
from collections.abc import Iterable, Sequence


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
