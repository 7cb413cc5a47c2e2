"""Runs the offline tasks against a model, which comes in as two functions, and returns their scores.

Only handwriting and photographs of the held-out split are used, and only seeds of its own (`example.generator`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from PIL import Image

from casa.errors import UserError
from casa.evaluation import pages, scenes
from casa.evaluation.example import Example, QuestionAnswer, generator
from casa.evaluation.metrics import exact_match, word_error_rate, words
from casa.evaluation.stream import MAX_SIDE as MAX_STREAM_SIDE
from casa.evaluation.stream import MIN_SIDE as MIN_STREAM_SIDE
from casa.evaluation.stream import StreamExample, stream
from casa.settings import near

Answerer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]
OnProgress = Callable[[str, int, int], None]

TASKS = ("pages", "scenes", "stream")
BATCH = 16  # questions per call of `answer`
STREAM_SECONDS = 20.0
# how a picture is drawn, what is asked about it, and its longest side in px
_PICTURES: dict[str, tuple[Callable[..., Example], Any, int]] = {
    "pages": (pages.page, pages.EVALUATION_TURNS, pages.MAX_SIDE),
    "scenes": (scenes.scene, scenes.EVALUATION_TURNS, scenes.MAX_SIDE),
}


class CaptioningSession(Protocol):
    """One live stream: gives each frame's caption, "" when nothing is new."""

    def step(self, frame: Image.Image, /) -> str: ...


def check_tasks(names: Iterable[str], more: Iterable[str] = ()) -> list[str]:
    """The names in order without repeats; UserError for one that is no task (nor one of `more`), or for none."""
    chosen = list(dict.fromkeys(name.strip() for name in names))
    known = (*TASKS, *more)
    for name in chosen:
        if name not in known:
            raise UserError(f"There is no task {name!r}; {near(name, known, 'choose from')}")
    if not chosen:
        raise UserError(f"No task was named; choose from {', '.join(TASKS)}.")
    return chosen


def evaluate(
    tasks: Iterable[str],
    answer: Answerer,
    make_session: Callable[[], CaptioningSession],
    *,
    seed: int = 0,
    limit: int = 200,
    largest: int | None = None,
    progress: OnProgress | None = None,
) -> dict[str, dict[str, float]]:
    """Scores a model on tasks by name; the same seed, limit and largest give the same pictures.

    Args:
        tasks: Of pages, scenes and stream.
        answer: Answers each question about its picture: takes and returns lists of equal length.
        make_session: Opens a session for one stream.
        seed: Another seed draws other pictures.
        limit: How many pages (one line question and one digit question each), scenes (four questions each) and numbers
            shown in streams (of up to 20 s at 2 fps).
        largest: Longest side of a picture in px, where a task has larger ones; frames of a stream have at least 224.
        progress: Called with task, done and limit as it goes.

    Returns:
        {"pages": {"digits", "lines", "n"}, "scenes": {"accuracy", "n"}, "stream": {"wer", "n"}} for the tasks named,
        shares from 0 to 1.

    Raises:
        UserError: A task is unknown, the limit is below 1, or `largest` is below 112.
    """
    names = check_tasks(tasks)
    if limit < 1:
        raise UserError(f"The limit is {limit}; it must be 1 or more.")
    least = max(pages.MIN_SIDE, scenes.MIN_SIDE)
    if largest is not None and largest < least:
        raise UserError(f"The largest picture is {largest} px; it must be {least} or more.")
    told = progress or (lambda task, done, total: None)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        if name == "stream":
            found[name] = _score_streams(seed, limit, largest, make_session, told)
            continue
        answered: list[tuple[QuestionAnswer, str]] = []
        waiting: list[tuple[Image.Image, QuestionAnswer]] = []
        for done, example in enumerate(held_out(name, seed, limit, largest), start=1):
            waiting += [(example.image, turn) for turn in example.turns]
            while len(waiting) >= BATCH or (waiting and done == limit):
                answered += _answered(waiting[:BATCH], answer)
                del waiting[:BATCH]
            told(name, done, limit)
        kinds = {"digits": "digit", "lines": "line"} if name == "pages" else {"accuracy": None}
        found[name] = {score: _match(answered, kind) for score, kind in kinds.items()} | {"n": limit}
    return found


def draw_one(names: Iterable[str], largest: int | None = None) -> None:
    """Draws an example of each task, to be rid of it. UserError where what they are drawn from is not installed."""
    for name in names:
        if name == "stream":
            _stream(0, 1, 2.0, largest)
        else:
            next(held_out(name, 0, 1, largest))


def held_out(task: str, seed: int, limit: int, largest: int | None = None) -> Iterator[Example]:
    """The `limit` pages of an evaluation, one question for a line and one for a digit on each, or the scenes, four
    questions on each. largest: px."""
    draw, turns, most = _PICTURES[task]
    for number in range(1, limit + 1):
        rng = generator(task, "held_out", seed, number)
        yield draw(rng, "held_out", turns=turns, max_side=min(largest or most, most))


def _answered(asked: list[tuple[Image.Image, QuestionAnswer]], answer: Answerer) -> list[tuple[QuestionAnswer, str]]:
    given = answer([image for image, _ in asked], [turn.question for _, turn in asked])
    if len(given) != len(asked):
        raise ValueError(f"{len(asked)} questions were asked, {len(given)} answers came back.")
    return [(turn, text) for (_, turn), text in zip(asked, given, strict=True)]


def _match(answered: Iterable[tuple[QuestionAnswer, str]], kind: str | None) -> float:
    chosen = [(turn.answer, text) for turn, text in answered if kind in (None, turn.kind)]
    return exact_match([text for _, text in chosen], [truth for truth, _ in chosen])


def _score_streams(
    seed: int, limit: int, largest: int | None, make_session: Callable[[], CaptioningSession], told: OnProgress
) -> dict[str, float]:
    pairs: list[tuple[list[str], list[str]]] = []
    done = 0
    while done < limit:
        example = _stream(seed, len(pairs) + 1, STREAM_SECONDS, largest)
        truth = _until(example.captions(), limit - done)
        session = make_session()
        given = [session.step(frame) for frame, _ in zip(example.frames(), truth, strict=False)]
        pairs.append((truth, given))
        done += len(words(truth))
        told("stream", done, limit)
    return {"wer": word_error_rate(pairs), "n": done}


def _stream(seed: int, number: int, seconds: float, largest: int | None) -> StreamExample:
    most = min(max(largest or MAX_STREAM_SIDE, MIN_STREAM_SIDE), MAX_STREAM_SIDE)
    rng = generator("stream", "held_out", seed, number)
    return stream(rng, "held_out", seconds=seconds, max_side=most)


def _until(captions: list[str], most: int) -> list[str]:
    """The captions before number `most` + 1 appears."""
    new = [index for index, caption in enumerate(captions) if caption]
    return captions[: new[most]] if len(new) > most else captions
