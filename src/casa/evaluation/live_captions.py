"""Scores of live captions, of pairs of what a film's record says and what a model said while it watched.

live_wer         edits over the true words, of a whole stream
live_lag         seconds of film from when a true word is said to when the model says it, of the words it got right
live_repetition  the share of runs of four words that were said before in the same stream
"""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

from PIL import Image

from casa.data.pictures import open_one
from casa.data.record import Picture, Text
from casa.evaluation.metrics import Score, edit_distance, words
from casa.evaluation.questions import Question

RUN = 4  # words

Line = Mapping[str, Any]
Said = list[tuple[float, str, float]]
"""Of each frame about which something is said: its second in the film, the words, and the seconds it took."""


class LiveSession(Protocol):
    """One live stream: gives each frame's caption, "" when nothing is new."""

    def step(self, frame: Image.Image, /) -> str: ...


def true_captions(question: Question) -> list[tuple[float, str]]:
    """The words of a live record, each with the second of the frame that it follows."""
    found, time = [], 0.0
    for message in question.messages:
        for part in message.parts if message.role == "assistant" else ():
            if isinstance(part, Picture):
                time = time if part.time is None else part.time
            elif part.text.strip():
                found.append((time, part.text.strip()))
    return found


def prompt_of(question: Question) -> str:
    """What the user asks for before the first frame."""
    asked = [part.text for part in question.messages[0].parts if isinstance(part, Text)]
    return "\n".join(asked) if question.messages[0].role == "user" else ""


def caption_live(question: Question, make_session: Callable[[str], LiveSession]) -> Said:
    """What a model says while it watches the frames of a live record, one at a time.

    Raises:
        BadRecord: A frame cannot be read.
    """
    session, found = make_session(prompt_of(question)), []
    for number, picture in enumerate(question.pictures, start=1):
        image = open_one(picture, number)
        began = perf_counter()
        if text := session.step(image):
            found.append((picture.time or 0.0, text, round(perf_counter() - began, 4)))
    return found


def live_line(question: Question, said: Said) -> dict[str, Any]:
    """The fields of a line of records: what was said when, and what should have been."""
    return {
        "answer": " ".join(text for _, text, _ in said),
        "captions": [list(entry) for entry in said],
        "truth": [list(entry) for entry in true_captions(question)],
    }


def live_wer(line: Line) -> Score | None:
    """Word error rate of a stream; None of what is no stream."""
    if "captions" not in line:
        return None
    truth, given = (words(entry[1] for entry in line[name]) for name in ("truth", "captions"))
    return Score(edit_distance(truth, given), len(truth))


def live_lag(line: Line) -> Score | None:
    """Seconds behind the truth, summed over the words that are right; None of what is no stream."""
    if "captions" not in line:
        return None
    truth, given = ([(word, entry[0]) for entry in line[name] for word in words([entry[1]])] for name in _BOTH)
    pairs = matches([word for word, _ in truth], [word for word, _ in given])
    return Score(sum(given[j][1] - truth[i][1] for i, j in pairs), len(pairs))


_BOTH = ("truth", "captions")


def live_repetition(line: Line) -> Score | None:
    """Runs of `RUN` words that were there before, out of all; None of what is no stream."""
    if "captions" not in line:
        return None
    said = words(entry[1] for entry in line["captions"])
    runs = [tuple(said[at : at + RUN]) for at in range(len(said) - RUN + 1)]
    return Score(len(runs) - len(set(runs)), len(runs))


LIVE_SCORERS = {"live_wer": live_wer, "live_lag": live_lag, "live_repetition": live_repetition}


def matches(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[int, int]]:
    """Places of equal items in an alignment of fewest edits: (place in the reference, place in the hypothesis)."""
    width = len(hypothesis) + 1
    table = [list(range(width))]
    for i, wanted in enumerate(reference, start=1):
        above, row = table[-1], [i]
        for j, given in enumerate(hypothesis, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (wanted != given)))
        table.append(row)
    found, i, j = [], len(reference), len(hypothesis)
    while i and j:
        same = reference[i - 1] == hypothesis[j - 1]
        if table[i][j] == table[i - 1][j - 1] + (not same):
            i, j = i - 1, j - 1
            found += [(i, j)] if same else []
        elif table[i][j] == table[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return found[::-1]
