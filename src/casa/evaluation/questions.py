"""Questions with their references, read from data of one's own: every answer of every record is asked for.

A question of a chat's later turn is asked with the true earlier answers before it, so that one slip is counted once and
all questions can be answered in batches.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from casa.data.formats import Row
from casa.data.frames import video_frames
from casa.data.hub import PREFIX, HubRows
from casa.data.pictures import RowContext
from casa.data.record import BadRecord, Message, NoRecord, Picture, Record, Text
from casa.data.records import FileRows
from casa.data.settings import Shard, SourceSettings
from casa.data.shapes import parse_row
from casa.errors import UserError
from casa.settings import NonNegative, Positive, Rate, Settings, require

KEPT_FILMS = 4  # whose frames are kept for the next questions about them


@dataclass(frozen=True)
class AdaptedRow:
    """A row of a set that has a form of its own: what is shown (parts of a chat), asked and accepted."""

    shown: list[dict[str, Any]]
    question: str
    references: tuple[str, ...]


Adapt = Callable[[Mapping[str, Any], str], AdaptedRow]
"""From a row, and the name of its subset or file. KeyError for a field that is not there."""


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """How questions are asked and answered.

    Attributes:
        suffix: Stands on a line of its own behind every question.
        template: Variables of the chat template.
        temperature: 0 is greedy.
        seed: Of the draws.
    """

    suffix: str = ""
    max_new_tokens: Positive = 64
    batch_size: Positive = 16
    temperature: Rate = 0.0
    top_k: NonNegative = 0
    top_p: float = 1.0
    seed: NonNegative = 0
    template: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")

    def of_generate(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p} if self.temperature else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": bool(self.temperature), **drawn}


@dataclass(frozen=True)
class Question:
    """What is asked of a model, and what it should answer.

    Attributes:
        index: Its place among all questions, from 0.
        record: File and line.
        turn: Which of the record's answers, from 1.
        messages: Of the chat, the question last; of a live record all, its captions among their frames.
        row: The set's own fields, where they are known, apart from pictures.
    """

    index: int
    record: str
    turn: int
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    is_live: bool = False
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The words of what is asked last."""
        asked = [message for message in self.messages if message.role == "user"]
        return asked[-1].text if asked else ""

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures in the order in which the model meets them."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Picture))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Of each picture, the same for the same file, or the same bytes."""
        return tuple(
            str(one.source) if isinstance(one.source, Path) else hashlib.blake2b(one.source, digest_size=16).hexdigest()
            for one in self.pictures
        )


@dataclass(frozen=True)
class BadQuestion:
    """A record, or a question, that cannot be asked: where it stands, and why."""

    record: str
    bad: BadRecord


def read_questions(
    sources: Sequence[SourceSettings],
    *,
    suffix: str = "",
    adapt: Adapt | None = None,
    limit: int | None = None,
    known: Sequence[str] = (),
) -> Iterator[Question | BadQuestion]:
    """All questions of the sources, in the order of their files.

    Args:
        sources: Where the records are.
        suffix: Stands on a line of its own behind every question, on how to answer it.
        adapt: Reads the rows of a set that has a form of its own.
        limit: Rows of every source at most, good or bad.
        known: Fields of a row that are kept beside its questions; `task` is the name of its subset or file.

    Raises:
        UserError: Data that are not there.
    """
    index = 0
    # questions about one film follow each other
    frames_of = lru_cache(maxsize=KEPT_FILMS)(video_frames)
    for source, row in rows_of(sources, limit):
        fields: dict[str, Any] = {}
        try:
            if isinstance(row.value, BadRecord):
                raise row.value
            root = row.folder if source.root is None else Path(source.root).expanduser()
            context = RowContext(row.origin, source, root, row.members, frames_of)
            if adapt is None:
                record = parse_row(row.value, context)
            else:
                task = source.subset or Path(row.origin.path).stem
                record = _adapted(adapt, row.value, task, context)
                values = {**row.value, "task": task} if isinstance(row.value, Mapping) else {}
                fields = {name: values[name] for name in known if name in values}
        except BadRecord as bad:
            yield BadQuestion(str(row.origin), bad)
            continue
        except NoRecord:
            continue
        for question in questions_of(record, suffix):
            yield replace(question, index=index, row=fields)
            index += 1


def shuffled_pictures(questions: Iterable[Question | BadQuestion]) -> Iterator[Question | BadQuestion]:
    """The questions, each with the pictures of the next record that has others: what is answered without looking?

    The last ones have those of the first. Where that record has fewer pictures, they come again. The references stay.

    Raises:
        UserError: All questions are about the same pictures.
    """
    held: list[Question | BadQuestion] = []
    first: tuple[Picture, ...] = ()
    keys: tuple[str, ...] = ()
    for question in questions:
        if isinstance(question, Question) and question.pictures and question.keys != keys:
            if not first:
                first = question.pictures
            else:
                yield from (_about(one, question.pictures) for one in held)
                held = []
            keys = question.keys
        held.append(question)
    last = next((one for one in held if isinstance(one, Question) and one.pictures), None)
    if last is not None and last.pictures == first:
        raise UserError("shuffled-images takes the pictures of other records, and all are about the same; give more.")
    yield from (_about(one, first) for one in held)


def _about(question: Question | BadQuestion, pictures: Sequence[Picture]) -> Question | BadQuestion:
    """The question with other pictures in the places of its own."""
    if isinstance(question, BadQuestion):
        return question
    left = cycle(pictures)
    messages = tuple(
        replace(message, parts=tuple(next(left) if isinstance(part, Picture) else part for part in message.parts))
        for message in question.messages
    )
    return replace(question, messages=messages)


def rows_of(sources: Sequence[SourceSettings], limit: int | None = None) -> Iterator[tuple[SourceSettings, Row]]:
    """Rows of the sources as their files have them, each with its source. UserError for data that are not there.

    Args:
        limit: Of every source.
    """
    for source in sources:
        kind = HubRows if source.path.startswith(PREFIX) else FileRows
        for row in islice(kind(source, Shard(), 0, False).start(0), limit):
            yield source, row


def _adapted(adapt: Adapt, value: object, task: str, context: RowContext) -> Record:
    try:
        if not isinstance(value, Mapping):
            raise TypeError("it is no object with fields")
        found = adapt(value, task)
    except KeyError as error:
        raise BadRecord("wrong-type", f"The row has no field {error}: it is of another set, or another form.") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadRecord("wrong-type", f"The row is not as this set has them ({error}).") from error
    asked = [*found.shown, {"type": "text", "text": found.question}]
    said = found.references[0] if found.references else ""
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return replace(parse_row({"messages": turns}, context), references=found.references)


def questions_of(record: Record, suffix: str = "") -> list[Question]:
    """One question for every answer that is to be learned; of live captions, one for all of them."""
    origin = str(record.origin)
    if record.is_live:
        parts = [part for message in record.messages if message.role == "assistant" for part in message.parts]
        said = [part.text for part in parts if isinstance(part, Text)]
        return [Question(0, origin, 1, record.messages, (" ".join(said),), is_live=True)]
    answers = [
        number for number, message in enumerate(record.messages) if message.role == "assistant" and message.learn
    ]
    alone = len(answers) == 1 and record.references
    return [
        Question(
            0,
            origin,
            turn,
            _with_suffix(record.messages[:number], suffix),
            record.references if alone else (record.messages[number].text.strip(),),
        )
        for turn, number in enumerate(answers, start=1)
    ]


def _with_suffix(messages: tuple[Message, ...], suffix: str) -> tuple[Message, ...]:
    if not suffix or not messages or messages[-1].role != "user":
        return messages
    last = messages[-1]
    return (*messages[:-1], replace(last, parts=(*last.parts, Text(f"\n{suffix}" if last.text else suffix))))
