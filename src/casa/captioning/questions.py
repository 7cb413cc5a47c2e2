"""Questions asked in mid-stream: each of the first frame at or after its second."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from casa.errors import UserError


@dataclass(frozen=True)
class Question:
    """What is asked, and at which second of the stream."""

    seconds: float
    text: str


def parse_question(written: str) -> Question:
    """ "12.5=What is on the left?" -> Question(12.5, "What is on the left?"). Raises UserError for anything else."""
    time, mark, text = written.partition("=")
    try:
        seconds = float(time)
    except ValueError:
        seconds = math.nan
    if not mark or not text.strip() or not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f'"{written}" is no question with its second; write it as 12.5="What is on the left?"')
    return Question(seconds, text.strip())


class Questions:
    """Those not asked yet, in order. asked: how many have been."""

    def __init__(self, questions: Iterable[Question], asked: int = 0) -> None:
        self._all = sorted(questions, key=lambda question: question.seconds)
        self.asked = asked

    def due(self, seconds: float) -> list[Question]:
        """Those whose time has come at this frame."""
        ready = [question for question in self._all[self.asked :] if question.seconds <= seconds + 1e-3]
        self.asked += len(ready)
        return ready
