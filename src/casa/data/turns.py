"""Turns of a conversation, from the values of rows: who speaks, clean text, and pictures at their places.

Fields beside the words that change what is learned are followed where a record can say so, and refused by name where
not (docs/data.md says the same):

    followed    weight, train, training, loss of a message      an answer that is read and not learned
                system, system_prompt of a row                  a system's turn before all others
    refused     what stands in `ROW` and `MESSAGE`              tools, pairs of good and bad answers, sound, ...
    passed over every other key                                 id, source, score: notes of whoever made the set

An empty field (null, "", [], {}, false) says nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from casa.data.pictures import RowContext
from casa.data.record import BadRecord, Message, Origin, Picture, Record, Role, Text

Fields = Mapping[str, Any]
Parts = list[Text | Picture]

TAG = "<image>"
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

_TOOLS = "calls of tools are not learned: leave the record out, or write the call as words"
_PAIR = "of a pair only the good answer can be learned: write it as an answer, and leave the other out"
_SOUND = "sound is not heard: leave the record out"
_THOUGHTS = "thoughts beside an answer are not learned: write them into it, or leave them out"
_PLACED = "its place among the words is not told: write it as a part of the content"
_ALIKE = "records of a source are learned alike: leave the field out, and give sources weights"
_SPANS = "only whole answers are learned or not: write train: true or false"

ROW: Mapping[str, str] = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output"), _PAIR),
    **dict.fromkeys(("audio", "audios"), _SOUND),
    **dict.fromkeys(("sample_weight", "loss_weight"), _ALIKE),
    "history": "earlier turns belong into one chat: write all of them as messages",
}
MESSAGE: Mapping[str, str] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools"), _TOOLS),
    **dict.fromkeys(("audio", "audios"), _SOUND),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _THOUGHTS),
    **dict.fromkeys(("image", "images", "video", "videos"), _PLACED),
    **dict.fromkeys(("train_detail", "training_detail"), _SPANS),
    **dict.fromkeys(("chosen", "rejected"), _PAIR),
    "name": "templates know no names: write into the words who speaks",
    "refusal": "write it as the answer's words, or leave the record out",
}
_LEARNED = ("weight", "train", "training", "loss")
_SYSTEM = ("system", "system_prompt")

_IMAGE = ("image", "image_url", "input_image")
_VIDEO = ("video", "video_url", "input_video")
_TEXT = ("text", "input_text", "output_text")


def read_messages(
    entries: Iterable[object],
    pictures: Sequence[Picture],
    context: RowContext,
    *,
    read: int = 0,
    placed: bool = True,
    tags: Sequence[str] = (TAG,),
) -> list[Message]:
    """The messages of a chat, with the pictures of its row at their places.

    A place is an image part without a file, or a tag in a text; beside image parts a tag is only text.

    Args:
        entries: objects with role and content (or from and value). Content is a string, or parts: text; image_url with
            a path or a data: URI; image with its file, or as a place; video.
        pictures: those of the row, in the order of their places.
        context: finds what the parts name.
        read: so many of the first messages are not learned, whoever speaks.
        placed: pictures for which no text has a place are an error; otherwise they stand before a user's first words.
        tags: what marks a place in a text.

    Raises:
        BadRecord: what the row says is no chat, or cannot be followed.
    """
    turns = [_turn(entry) for entry in entries]
    contents = [content for _, content, _ in turns]
    parted = any(_kind(part) in (*_IMAGE, *_VIDEO) for content in contents for part in many(content))
    told = parted or placed or any(tag in text for content in contents for text in _texts(content) for tag in tags)
    placer = PicturePlacer(pictures if told else (), () if parted else tags)
    found = [
        Message(role, tuple(_parts(content, placer, context)), learn and number >= read)
        for number, (role, content, learn) in enumerate(turns)
    ]
    placer.check()
    if told:
        return found
    first = next((number for number, message in enumerate(found) if message.role == "user"), None)
    return [
        replace(message, parts=(*pictures, *message.parts)) if number == first else message
        for number, message in enumerate(found)
    ]


def record_of(messages: Sequence[Message], origin: Origin, references: Iterable[str] = ()) -> Record:
    """A record, if it holds something to learn: every answer has words, and every question words or pictures.

    references: as in `Record`. Raises BadRecord.
    """
    answered = False
    for number, message in enumerate(messages, start=1):
        spoken = bool(message.text.strip())
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


def with_system(record: Record, row: Fields) -> Record:
    """The record, led by the system prompt that a row keeps beside its turns, if it does. Raises BadRecord."""
    said = [text_of(row[name], name) for name in _SYSTEM if not _is_empty(row.get(name))]
    if not any(text.strip() for text in said):
        return record
    first = record.messages[0]
    if first.role == "system":
        said.append(first.text)
    if len(set(said)) > 1:
        raise BadRecord("unfollowed-field", "The row has two system prompts that differ: leave one out.")
    if first.role == "system":
        return record
    return replace(record, messages=(Message("system", (Text(said[0]),)), *record.messages))


def refuse(fields: Fields, known: Mapping[str, str], what: str) -> None:
    """Raises BadRecord for a field of `known` that says something. what: its owner, for the sentence."""
    for name, remedy in known.items():
        if name in fields and not _is_empty(fields[name]):
            raise BadRecord("unfollowed-field", f"{what} has {name}, which cannot be followed: {remedy}.")


class PicturePlacer:
    """Deals pictures out to their places in the text, in order, and checks that the two agree.

    tags: what marks a place in plain text; none where text is only text.
    """

    def __init__(self, pictures: Iterable[Picture], tags: Sequence[str] = (TAG,)) -> None:
        self._pictures = list(pictures)
        self._places = 0
        self._tags = tags

    def next(self) -> Parts:
        """What stands at the next place: a picture, or nothing if there are none left (`check` says so)."""
        self._places += 1
        return [*self._pictures[self._places - 1 : self._places]]

    def split(self, text: str) -> Parts:
        r"""Text cut at its tags, with a picture at each.

        A line end beside a tag, and blanks around that, belong to the tag, as does what is blank between two tags; a
        blank within a line is text: "See <image>\nand <image> there." is "See ", a picture, "and ", another, " there.".
        """
        for tag in self._tags[1:]:
            text = text.replace(tag, self._tags[0])
        if not self._tags or self._tags[0] not in text:
            return [Text(text)] if text else []
        pieces = text.split(self._tags[0])
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
        if self._places == given:
            return
        are = "is 1 picture" if given == 1 else f"are {given} pictures"
        places = "1 place" if self._places == 1 else f"{self._places} places"
        if self._places > given:
            raise BadRecord(
                "tag-without-picture",
                f"The text has {places} for pictures, and there {are}: give the missing ones, or leave out "
                f"{self._tags[0] if self._tags else 'the part'}.",
            )
        raise BadRecord(
            "picture-without-tag",
            f"There {are}, and the text has {places} for them: write "
            f"{self._tags[0] if self._tags else 'an image part'} where each stands.",
        )


def text_of(value: object, what: str) -> str:
    """A string without halves of characters. what: its name in sentences. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord("wrong-type", f"{what} is {_type_name(value)}, not text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(
            "broken-text", f"{what} holds half of a character at {error.start}: write the text again as UTF-8."
        ) from error
    return value


def list_of(value: object, what: str) -> Sequence[Any]:
    """A list or tuple. Raises BadRecord."""
    if not isinstance(value, (list, tuple)):
        raise BadRecord("wrong-type", f"{what} is {_type_name(value)}, not a list.")
    return value


def seconds_of(value: object) -> float:
    """A time in a video, in seconds from its start. Raises BadRecord."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise BadRecord("wrong-type", f"A time is {value!r:.40}, not a number of seconds.")
    return float(value)


def first_of(row: Fields, *keys: str) -> Any:
    """What the first of the keys holds that holds anything: tables fill the keys that a row lacks with null."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def many(value: object) -> list[Any]:
    """None, one thing or a list of them, as a list: how sets write their image columns."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def column_of(row: Fields, names: Sequence[str], what: str) -> Any:
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


def row_pictures(row: Fields, picture: Callable[[object], Picture]) -> list[Picture]:
    """The pictures of a row's column `image` or `images`. Raises BadRecord if it has both."""
    one, several = many(row.get("image")), many(row.get("images"))
    if one and several and one != several:
        raise BadRecord("unknown-shape", "The row has image and images: say which, columns: {images: image}.")
    return [picture(value) for value in several or one]


def _turn(entry: object) -> tuple[Role, Any, bool]:
    """Who speaks, the content, and whether it is to be learned, if an assistant's."""
    if not isinstance(entry, Mapping):
        raise BadRecord("wrong-type", "A message is no object with role and content.")
    who = first_of(entry, "role", "from")
    if who is None:
        raise BadRecord("wrong-type", "A message has no role: say who speaks.")
    if not isinstance(who, str) or who.lower() not in ROLES:
        raise BadRecord("wrong-type", f"A turn is by {who!r:.60}, not by a system, user or assistant.")
    role = ROLES[who.lower()]
    refuse(entry, MESSAGE, "A message")
    if entry.get("mask") is not None:
        raise BadRecord(
            "unfollowed-field", "A message has mask, which sets read in two ways: write train: true or false instead."
        )
    given = {name: entry[name] for name in _LEARNED if entry.get(name) is not None}
    for name, value in given.items():
        why = ""
        if value not in (0, 1):
            why = "only 0 (read) and 1 (learned) are followed"
        elif value and role != "assistant":
            why = "only answers are learned"
        if why:
            raise BadRecord("unfollowed-field", f"A message by the {role} has {name} {value!r:.40}: {why}.")
    return role, first_of(entry, "content", "value"), all(given.values())


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, Mapping) else "text"


def _texts(content: object) -> list[str]:
    """All strings of a content, whatever else is in it."""
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in many(content)]
    return [text for text in parts if isinstance(text, str)]


def _parts(content: object, placer: PicturePlacer, context: RowContext) -> Parts:
    if not isinstance(content, (list, tuple)):
        return placer.split(text_of(content, "A message's content"))
    found: Parts = []
    for part in content:
        kind = _kind(part)
        if isinstance(part, str) or kind in _TEXT:
            found += placer.split(text_of(part if isinstance(part, str) else part.get("text"), "A text part"))
        elif kind in _IMAGE:
            value = _named(part, "image", "image_url", "url", "path", "bytes")
            found += placer.next() if value is None else [context.picture(value)]
        elif kind in _VIDEO:
            path = context.path(_named(part, "video", "video_url", "url", "path"), "video")
            start, end = part.get("video_start") or 0.0, part.get("video_end")
            found += context.frames(path, seconds_of(start), None if end is None else seconds_of(end), thin=True)
        else:
            known = "text, image, image_url or video"
            raise BadRecord("wrong-type", f"A part is of the type {kind!r:.40}, not {known}.")
    # words in a row are one text to the model
    joined: Parts = []
    for part in found:
        if joined and isinstance(part, Text) and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def _named(part: Fields, *keys: str) -> Any:
    """The first of the keys that holds something; {"url": ...} inside counts as what it names."""
    for key in keys:
        value = part.get(key)
        if isinstance(value, Mapping) and "bytes" not in value:
            value = value.get("url") or value.get("path")
        if value is not None:
            return value
    return None


def _is_empty(value: object) -> bool:
    if isinstance(value, Mapping):
        # tables fill all keys of an object
        return all(map(_is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    return value is None or value is False or value == ""


def _type_name(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
