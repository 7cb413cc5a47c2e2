"""Values of rows, checked: text that tokenizers can read, lists that are lists, and pictures at their tags."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Message, Origin, Picture, Record, Role, Text

# what conversations call the three sides
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TAG = "<image>"

Parts = list[Text | Picture]


def text_of(value: Any, what: str) -> str:
    """A string without halves of characters. what: its name in sentences. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord("wrong-type", f"{what} is {_kind(value)}, not text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(
            "broken-text", f"{what} holds half of a character at {error.start}: write the text again as UTF-8."
        ) from error
    return value


def list_of(value: Any, what: str) -> Sequence[Any]:
    """A list or tuple. Raises BadRecord."""
    if not isinstance(value, (list, tuple)):
        raise BadRecord("wrong-type", f"{what} is {_kind(value)}, not a list.")
    return value


def seconds_of(value: Any) -> float:
    """A time in a video, in seconds from its start. Raises BadRecord."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise BadRecord("wrong-type", f"A time is {value!r:.40}, not a number of seconds.")
    return float(value)


def role_of(value: Any) -> Role:
    """Who speaks. Raises BadRecord."""
    if isinstance(value, str) and value.lower() in ROLES:
        return ROLES[value.lower()]
    raise BadRecord("wrong-type", f"A turn is by {value!r:.60}, not by a system, user or assistant.")


def first_of(row: Mapping[str, Any], *keys: str) -> Any:
    """What the first of the keys holds that holds anything: tables fill the keys that a row lacks with null."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def many(value: Any) -> list[Any]:
    """None, one thing or a list of them, as a list: how sets write their image columns."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def column_of(row: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    """What the one column of those names holds. what: its name in settings. Raises BadRecord for none or several."""
    found = [name for name in names if row.get(name) is not None]
    if not found:
        raise BadRecord("wrong-type", f"The row has no {what}: name its column, columns: {{{what}: ...}}.")
    if len(found) > 1:
        raise BadRecord(
            "unknown-shape",
            f"The row has {' and '.join(found)}: say which is the {what}, columns: {{{what}: {found[0]}}}.",
        )
    return row[found[0]]


def row_pictures(row: Mapping[str, Any], picture: Callable[[Any], Picture]) -> list[Picture]:
    """The pictures of a row's column `image` or `images`. Raises BadRecord if it has both."""
    one, several = many(row.get("image")), many(row.get("images"))
    if one and several and one != several:
        raise BadRecord("unknown-shape", "The row has image and images: say which, columns: {images: image}.")
    return [picture(value) for value in several or one]


def pictures_before(messages: Sequence[Message], pictures: Sequence[Picture]) -> list[Message]:
    """Messages of text with their pictures: at <image> tags where there are any, otherwise before a user's first words.

    Raises BadRecord if tags and pictures differ in number.
    """
    texts = [part for message in messages for part in message.parts if isinstance(part, Text)]
    if any(TAG in part.text for part in texts):
        places = Places(pictures)
        placed = [replace(message, parts=tuple(places.split(text_in(message)))) for message in messages]
        places.check()
        return placed
    first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    return [
        replace(message, parts=(*pictures, *message.parts)) if number == first else message
        for number, message in enumerate(messages)
    ]


def text_in(message: Message) -> str:
    """All text of a message."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


class Places:
    """Deals pictures out to their places in the text, in order, and sees to it that the two agree.

    tag: what marks a place in plain text; None where text is only text.
    """

    def __init__(self, pictures: Iterable[Picture], tag: str | None = TAG) -> None:
        self._pictures = list(pictures)
        self._taken = self._places = 0
        self._tag = tag

    def next(self) -> Parts:
        """What stands at the next place: a picture, or nothing if there are none left (`check` says so)."""
        self._places += 1
        taken = self._pictures[self._taken : self._taken + 1]
        self._taken += len(taken)
        return list(taken)

    def split(self, text: str) -> Parts:
        r"""Text cut at its tags, with a picture at each.

        A line end beside a tag, and blanks around that, belong to the tag, as does what is blank between two tags; a
        blank within a line is text: "See <image>\nand <image> there." is "See ", a picture, "and ", another, " there.".
        """
        if self._tag is None or self._tag not in text:
            return [Text(text)] if text else []
        pieces = text.split(self._tag)
        parts: Parts = []
        for number, piece in enumerate(pieces):
            if number:
                parts += self.next()
                behind = piece.lstrip()
                piece = behind if "\n" in piece[: len(piece) - len(behind)] else piece
            if number < len(pieces) - 1:
                before = piece.rstrip()
                piece = before if "\n" in piece[len(before) :] else piece
            parts += [Text(piece)] if piece.strip() else []
        return parts

    def check(self) -> None:
        """Raises BadRecord unless there was one place for each picture."""
        given = len(self._pictures)
        if self._places > given:
            raise BadRecord(
                "tag-without-picture",
                f"The text has {_count(self._places, 'place')} for pictures, and there {_are(given)}: "
                f"give the missing ones, or leave out {self._tag or 'the part'}.",
            )
        if self._places < given:
            raise BadRecord(
                "picture-without-tag",
                f"There {_are(given)}, and the text has {_count(self._places, 'place')} for them: "
                f"write {self._tag or 'an image part'} where each stands.",
            )


def record_of(messages: Sequence[Message], origin: Origin, references: Iterable[str] = ()) -> Record:
    """A record, if it holds something to learn: every answer has words, and every question words or pictures.

    references: as in `Record`. Raises BadRecord.
    """
    answered = False
    for number, message in enumerate(messages, start=1):
        spoken = any(isinstance(part, Text) and part.text.strip() for part in message.parts)
        if message.role == "assistant":
            answered |= message.learn
            if not spoken:
                raise BadRecord("empty-answer", f"Turn {number}, an assistant's, is empty: leave the record out.")
        elif message.role == "user" and not spoken and not any(isinstance(part, Picture) for part in message.parts):
            raise BadRecord("empty-question", f"Turn {number}, a user's, is empty: leave the record out.")
        elif message.role == "system" and number > 1:
            raise BadRecord("wrong-type", f"Turn {number} is a system's: put it first.")
    if not answered:
        some = any(message.role == "assistant" for message in messages)
        why = "No assistant's turn is to be learned" if some else "No turn is an assistant's"
        raise BadRecord("empty-answer", f"{why}: there is nothing to learn.")
    return Record(tuple(messages), origin, tuple(references))


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _are(number: int) -> str:
    return "is 1 picture" if number == 1 else f"are {number} pictures"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
