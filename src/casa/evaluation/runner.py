"""Runs the offline tasks against a model and returns their scores.

The model comes in as two callables, so that this file knows no model class:
    answer(pictures, questions) -> answers     three lists of equal length; each question stands alone
    make_session() -> session                  with session.step(picture) -> caption of that frame

Only handwriting and photographs of the held-out split are used, and only seeds of its own (see seeds.py).
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from PIL import Image

from casa.errors import UserError
from casa.evaluation import pages, scenes
from casa.evaluation.example import Example, QuestionAnswer, generator
from casa.evaluation.metrics import exact_match, word_error_rate, words
from casa.evaluation.stream import MAX_SIDE as MOST_OF_STREAM
from casa.evaluation.stream import MIN_SIDE as LEAST_OF_STREAM
from casa.evaluation.stream import stream

Answerer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]
Progress = Callable[[str, int, int], None]


class Session(Protocol):
    """One live stream: gives each frame's caption, "" when nothing is new."""

    def step(self, frame: Image.Image, /) -> str: ...


BATCH = 16  # questions per call of `answer`
STREAM_SECONDS = 20.0


def held_out_pages(seed: int, limit: int, largest: int | None = None) -> Iterable[Example]:
    """The `limit` pages of an evaluation, one question for a line and one for a digit on each. largest: px."""
    most = min(largest or pages.MAX_SIDE, pages.MAX_SIDE)
    rngs = (generator("pages", "held_out", seed, i + 1) for i in range(limit))
    return (pages.page(rng, "held_out", turns=pages.EVALUATION_TURNS, max_side=most) for rng in rngs)


def held_out_scenes(seed: int, limit: int, largest: int | None = None) -> Iterable[Example]:
    """The `limit` scenes of an evaluation, four questions on each. largest: px."""
    most = min(largest or scenes.MAX_SIDE, scenes.MAX_SIDE)
    rngs = (generator("scenes", "held_out", seed, i + 1) for i in range(limit))
    return (scenes.scene(rng, "held_out", turns=scenes.EVALUATION_TURNS, max_side=most) for rng in rngs)


def _answers(
    task: str, examples: Iterable[Example], limit: int, answer: Answerer, progress: Progress | None
) -> list[tuple[QuestionAnswer, str]]:
    """Every turn of every example with the model's answer, in order."""
    answered: list[tuple[QuestionAnswer, str]] = []
    waiting: list[tuple[Image.Image, QuestionAnswer]] = []
    for done, example in enumerate(examples, start=1):
        waiting += [(example.image, turn) for turn in example.turns]
        while len(waiting) >= BATCH or (waiting and done == limit):
            batch, waiting = waiting[:BATCH], waiting[BATCH:]
            given = answer([image for image, _ in batch], [turn.question for _, turn in batch])
            if len(given) != len(batch):
                raise ValueError(f"{len(batch)} questions were asked, {len(given)} answers came back.")
            answered += [(turn, text) for (_, turn), text in zip(batch, given, strict=True)]
        if progress is not None:
            progress(task, done, limit)
    return answered


def _match(answered: Iterable[tuple[QuestionAnswer, str]], kind: str | None = None) -> float:
    chosen = [(turn.answer, text) for turn, text in answered if kind in (None, turn.kind)]
    return exact_match([text for _, text in chosen], [truth for truth, _ in chosen])


def _pages(
    seed: int, limit: int, largest: int | None, answer: Answerer, _: Any, progress: Progress | None
) -> dict[str, float]:
    answered = _answers("pages", held_out_pages(seed, limit, largest), limit, answer, progress)
    return {"digits": _match(answered, "digit"), "lines": _match(answered, "line"), "n": limit}


def _scenes(
    seed: int, limit: int, largest: int | None, answer: Answerer, _: Any, progress: Progress | None
) -> dict[str, float]:
    answered = _answers("scenes", held_out_scenes(seed, limit, largest), limit, answer, progress)
    return {"accuracy": _match(answered), "n": limit}


def _stream(
    seed: int,
    limit: int,
    largest: int | None,
    _: Any,
    make_session: Callable[[], Session],
    progress: Progress | None,
) -> dict[str, float]:
    most = _most_of_stream(largest)
    pairs: list[tuple[list[str], list[str]]] = []
    done = 0
    while done < limit:
        rng = generator("stream", "held_out", seed, len(pairs) + 1)
        example = stream(rng, "held_out", seconds=STREAM_SECONDS, max_side=most)
        truth = _cut(example.captions(), limit - done)
        session = make_session()
        given = [session.step(frame) for frame, _ in zip(example.frames(), truth, strict=False)]
        pairs.append((truth, given))
        done += len(words(truth))
        if progress is not None:
            progress("stream", done, limit)
    return {"wer": word_error_rate(pairs), "n": done}


def _most_of_stream(largest: int | None) -> int:
    """The longest side of a frame, in px."""
    return min(max(largest or MOST_OF_STREAM, LEAST_OF_STREAM), MOST_OF_STREAM)


def _cut(captions: list[str], most: int) -> list[str]:
    """The captions before number `most` + 1 appears."""
    new = [index for index, caption in enumerate(captions) if caption]
    return captions[: new[most]] if len(new) > most else captions


TASKS: dict[str, Callable[..., dict[str, float]]] = {"pages": _pages, "scenes": _scenes, "stream": _stream}


def check_tasks(names: Iterable[str]) -> list[str]:
    """The names in order without repeats; UserError for one that is no task, or for none."""
    chosen = list(dict.fromkeys(name.strip() for name in names))
    for name in chosen:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(TASKS)}."
            raise UserError(f"There is no task {name!r}; {hint}")
    if not chosen:
        raise UserError(f"No task was named; choose from {', '.join(TASKS)}.")
    return chosen


def draw_one(names: Iterable[str], largest: int | None = None) -> None:
    """Draws an example of each task, to be rid of it. UserError where what they are drawn from is not installed."""
    for name in names:
        if name == "stream":
            stream(generator("stream", "held_out", 0, 1), "held_out", seconds=1.0, max_side=_most_of_stream(largest))
        else:
            next(iter((held_out_pages if name == "pages" else held_out_scenes)(0, 1, largest)))


def evaluate(
    tasks: Iterable[str],
    answer: Answerer,
    make_session: Callable[[], Session],
    *,
    seed: int = 0,
    limit: int = 200,
    largest: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model on tasks by name; the same seed, limit and largest give the same pictures.

    limit: how many pages (one line question and one digit question each), scenes (four questions each) and
    numbers shown in streams (of up to 20 s at 2 fps). largest: longest side of a picture in px, where a task has larger
    ones; frames of a stream have at least 224. progress(task, done, limit) is called as it goes.
    Returns {"pages": {"digits", "lines", "n"}, "scenes": {"accuracy", "n"}, "stream": {"wer", "n"}}, shares
    from 0 to 1, for the tasks named. UserError for an unknown task, a limit below 1, or a `largest` below 112.
    """
    names = check_tasks(tasks)
    if limit < 1:
        raise UserError(f"The limit is {limit}; it must be 1 or more.")
    least = max(pages.MIN_SIDE, scenes.MIN_SIDE)
    if largest is not None and largest < least:
        raise UserError(f"The largest picture is {largest} px; it must be {least} or more.")
    return {name: TASKS[name](seed, limit, largest, answer, make_session, progress) for name in names}
