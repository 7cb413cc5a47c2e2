"""A picture and what is asked about it: the one shape that all tasks have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator
from PIL import Image

from casa.vision.page_words import ORDINALS
from projects.casa_smol.words import pick

Seed = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """A question and its answers: the first as the model shall give it, others that are as right."""

    question: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The one to learn."""
        return self.answers[0]


@dataclass(frozen=True)
class Asked:
    """A picture with questions. seed: draws exactly this one again, with the task's name and the split."""

    task: str
    split: str
    seed: Seed
    picture: Image.Image
    turns: tuple[Turn, ...]

    @property
    def image(self) -> Image.Image:
        """The picture, under the name that casa's data writers use."""
        return self.picture


def turn(rng: Generator, wordings: Sequence[str], answer: Any, *also: Any, **names: Any) -> Turn:
    """A question in one of its wordings, with the names filled in; sometimes in small letters or without its mark."""
    question = pick(rng, wordings).format(**names)
    if rng.random() < 0.08:
        question = question[:1].lower() + question[1:]
    if rng.random() < 0.08:
        question = question.rstrip("?.")
    return Turn(question, tuple(dict.fromkeys(map(str, (answer, *also)))))


def some(rng: Generator, turns: Sequence[Turn], most: int) -> tuple[Turn, ...]:
    """At most so many of the turns, in any order, no question twice."""
    kept: dict[str, Turn] = {}
    for number in rng.permutation(len(turns)):
        kept.setdefault(turns[int(number)].question, turns[int(number)])
    return tuple(kept.values())[:most]


def ordinal(number: int) -> str:
    """ "third" for 3; 1 to 20."""
    return ORDINALS[number - 1]
