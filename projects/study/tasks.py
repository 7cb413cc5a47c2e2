"""What a study asks: samples of text with pictures in it, by task, drawn from the pictures of a split.

    single    pages, scenes, charts    questions about one picture in front of them, as in casa's offline tasks
              midway                   the same with the picture somewhere in the middle of the question
              spoken                   a picture, and questions that do not need it
    several   ordinal                  three pictures one after the other: the number, or the colour, on one of them
              same                     three pictures: are the first and the last of the same colour?
              between                  two pictures with text between them: both numbers
              ago                      a stream of eight: the number, or the colour, that was shown n pictures ago

A sample is written as casa-tiny's chats are; every picture is followed by `<frame>`, so that it opens a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from projects.casa_tiny.chat import ASSISTANT, END, FRAME, IMAGE, USER, ChatTokens
from projects.study.pictures import Bank

SHOW = IMAGE + FRAME
STREAM = 8  # pictures of a stream
_PLACES = ("first", "second", "third")


@dataclass(frozen=True)
class Sample:
    """A chat about pictures.

    Args:
        parts: What is given and what is answered, in turn; `<image>` where a picture stands.
        pictures: Kind and number of each, in order.
        kind: What is asked, for scores by kind; of the last question.
        needs_picture: Whether nobody could answer without looking.
    """

    parts: tuple[str, ...]
    pictures: tuple[tuple[str, int], ...]
    kind: str
    needs_picture: bool = True


Task = Callable[[Bank, np.random.Generator, int], Sample]
"""Draws a sample with so many questions, where a task can ask several."""


def turns(asked: Sequence[tuple[str, str]], before: str = SHOW) -> tuple[str, ...]:
    """Parts of a chat of questions and answers, the pictures in front of all."""
    parts: list[str] = []
    for number, (question, answer) in enumerate(asked):
        parts += [USER + (before if number == 0 else "") + question + END + ASSISTANT, answer + END]
    return tuple(parts)


def about_one(kind: str) -> Task:
    """Questions about one picture of a kind."""

    def task(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
        number, asked = _some(bank, kind, rng, count)
        return Sample(turns([turn[:2] for turn in asked]), ((kind, number),), f"{kind}.{asked[-1][2]}")

    return task


def midway(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
    """A question about a page or a scene, the picture between two of its words."""
    kind = ("pages", "scenes")[int(rng.integers(2))]
    number, ((question, answer, _),) = _some(bank, kind, rng, 1)
    words = question.split(" ")
    cut = int(rng.integers(1, len(words)))
    asked = " ".join(words[:cut]) + SHOW + " " + " ".join(words[cut:])
    return Sample(turns([(asked, answer)], ""), ((kind, number),), f"midway.{kind}")


def spoken(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
    """Questions that need no picture, beside one."""
    kind = ("pages", "scenes")[int(rng.integers(2))]
    number = int(rng.integers(len(bank[kind].facts)))
    asked = []
    for _ in range(count):
        text = "".join(map(str, rng.integers(0, 10, int(rng.integers(1, 4)))))
        one, other = rng.integers(0, 5, 2).tolist()
        asked.append((f"Repeat {text}.", text) if rng.random() < 0.5 else (f"Add {one} to {other}.", str(one + other)))
    return Sample(turns(asked), ((kind, number),), "spoken", needs_picture=False)


def ordinal(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
    """Three pictures in a row: what is on one of them."""
    shown = [_shown(bank, rng) for _ in range(3)]
    at = int(rng.integers(3))
    question = f"What is on the {_PLACES[at]} picture?"
    return Sample(turns([(question, shown[at][1])], SHOW * 3), tuple(each[0] for each in shown), f"ordinal.{at + 1}")


def same(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
    """Three pictures of one shape each: are the outer two of the same colour? Half of them are."""
    cards = bank["cards"]
    chosen = rng.integers(len(cards.facts), size=3).tolist()
    if rng.random() < 0.4:
        wanted = _colour(bank, chosen[0])
        chosen[2] = int(rng.choice([n for n in range(len(cards.facts)) if _colour(bank, n) == wanted]))
    answer = "yes" if _colour(bank, chosen[0]) == _colour(bank, chosen[2]) else "no"
    question = "Are the first and the third picture of the same colour?"
    return Sample(turns([(question, answer)], SHOW * 3), tuple(("cards", n) for n in chosen), "same")


def between(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
    """Two pictures in the middle of a sentence, both to be told."""
    (one, said), (other, told) = _shown(bank, rng), _shown(bank, rng)
    question = f"Say what is here{SHOW} and then what is here{SHOW} in this order."
    return Sample(turns([(question, f"{said}, {told}")], ""), (one, other), "between")


def ago(bank: Bank, rng: np.random.Generator, count: int) -> Sample:
    """A stream of pictures, silence at each; then what was shown a while ago. 0 pictures ago is the last one."""
    shown = [_shown(bank, rng) for _ in range(STREAM)]
    back = int(rng.integers(STREAM))
    stream = USER + "Watch." + END + ASSISTANT + (SHOW + END) * STREAM
    question = f"What was shown {back} pictures ago?"
    parts = (stream + USER + question + END + ASSISTANT, shown[-1 - back][1] + END)
    return Sample(parts, tuple(each[0] for each in shown), f"ago.{back}")


SMALL: dict[str, Task] = {
    "pages": about_one("pages"),
    "scenes": about_one("scenes"),
    "charts": about_one("charts"),
    "midway": midway,
    "spoken": spoken,
    "ordinal": ordinal,
    "same": same,
    "between": between,
    "ago": ago,
}
REAL = (
    "line", "page", "receipt", "invoice", "form", "table", "chart", "dialog", "login", "settings", "window", "easy_vqa",
    "number", "prices",
)  # fmt: skip
"""At the real scale: questions about one picture, tasks of casa-smol and `printed`."""
TASKS = SMALL | {kind: about_one(kind) for kind in REAL}


def _some(bank: Bank, kind: str, rng: np.random.Generator, count: int) -> tuple[int, list[tuple[str, str, str]]]:
    number = int(rng.integers(len(bank[kind].facts)))
    known = bank[kind].facts[number]["turns"]
    return number, [tuple(known[int(n)]) for n in rng.permutation(len(known))[:count]]


def _shown(bank: Bank, rng: np.random.Generator) -> tuple[tuple[str, int], str]:
    """A number or a coloured shape, and what it is called."""
    kind = ("numbers", "cards")[int(rng.integers(2))]
    number = int(rng.integers(len(bank[kind].facts)))
    return (kind, number), bank[kind].facts[number]["lines"][0] if kind == "numbers" else _colour(bank, number)


def _colour(bank: Bank, number: int) -> str:
    return bank["cards"].facts[number]["shapes"][0][1]


def described(sample: Sample, bank: Bank) -> Sample:
    """The sample with what is on its pictures in words, where they stand: what a text model learns to look up.

    A language model knows how to find an answer in what it has read, long before it is given eyes.
    """
    words = iter([_words(bank[kind].facts[number]) for kind, number in sample.pictures])
    pieces = [part.split(IMAGE) for part in sample.parts]
    parts = tuple(piece[0] + "".join(next(words) + rest for rest in piece[1:]) for piece in pieces)
    return replace(sample, parts=parts, pictures=())


def _words(facts: Mapping[str, Any]) -> str:
    """`1 407, 2 31` of a page, `red star top left, blue circle right` of a scene, `7 red 3, 2 blue 5` of a chart."""
    if "lines" in facts:
        return ", ".join(f"{number} {line}" for number, line in enumerate(facts["lines"], start=1))
    if "shapes" in facts:
        return ", ".join(f"{colour} {kind} {place}" for kind, colour, place in facts["shapes"])
    return ", ".join(f"{name} {colour} {height}" for name, colour, height in facts["bars"])


@dataclass
class Writer:
    """Writes samples as tokens.

    Args:
        tokenizer: Of the text model.
        gist: Ids that stand behind every picture.
        marks: What stands for casa-tiny's marks of turns in another model's chats.
    """

    tokenizer: PreTrainedTokenizerBase
    gist: Sequence[int] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    _known: dict[str, list[int]] = field(default_factory=dict)

    def write(self, sample: Sample) -> ChatTokens:
        """The tokens of a sample; those of answers are learned."""
        ids: list[int] = []
        learn: list[bool] = []
        places: list[int] = []
        for number, part in enumerate(sample.parts):
            begin = len(ids)
            for at, piece in enumerate(part.split(IMAGE)):
                if at:
                    places.append(len(ids))
                    ids += self.gist
                ids += self._encode(piece)
            learn += [number % 2 == 1] * (len(ids) - begin)
        return ChatTokens(tuple(ids), tuple(learn), tuple(places))

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            written = text
            for mark, other in self.marks.items():
                written = written.replace(mark, other)
            self._known[text] = self.tokenizer.encode(written, add_special_tokens=False)
        return self._known[text]


def held_out(names: Mapping[str, int], bank: Bank, seed: int) -> list[Sample]:
    """So many samples of each task with one question each: the same for every run."""
    found = []
    for name, count in names.items():
        rng = np.random.default_rng([seed, 7, [*TASKS].index(name)])
        found += [TASKS[name](bank, rng, 1) for _ in range(count)]
    return found


def training_batch(
    weights: Mapping[str, float], bank: Bank, rng: np.random.Generator, samples: int, most_turns: int
) -> list[Sample]:
    """Samples of a step, tasks drawn by their weights."""
    names = [*weights]
    shares = np.array([weights[name] for name in names])
    chosen = rng.choice(len(names), samples, p=shares / shares.sum())
    return [TASKS[names[n]](bank, rng, int(rng.integers(1, most_turns + 1))) for n in chosen]
