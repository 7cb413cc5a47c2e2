"""Turns of a conversation, from the values of rows: who speaks, clean text, and pictures at their places.

Fields beside the words that change what is learned are followed where a record can say so, and refused by name where
not (`ROW`, `MESSAGE`). Every other key is a note of whoever made the set. An empty field says nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from casa.data.pictures import RowContext
from casa.data.record import BadRecord, Message, Picture, Record, Role, Text

Fields = Mapping[str, Any]
Parts = list[Text | Picture]
# of a message, before pictures are found: texts, and the image and video parts as they are written
Content = list[str | Fields]

TAG = "<image>"
# what conversations call the three sides
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
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
# what a content's parts are, and the keys that name their file
_KINDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
_FILES = {"image": ("image", "image_url", "url", "path", "bytes"), "video": ("video", "video_url", "url", "path")}


def record_of_chat(
    row: Fields,
    context: RowContext,
    entries: Iterable[object],
    *,
    pictures: Sequence[Picture] | None = None,
    read: int = 0,
    placed: bool = True,
    tags: Sequence[str] = (TAG,),
    references: Iterable[str] = (),
) -> Record:
    """A record from the messages of a chat, with the pictures of its row at their places.

    A place is an image part without a file, or a tag in a text; beside image parts a tag is only text.

    Args:
        row: Holds the pictures, as `image` or `images`.
        context: Finds what the row names.
        entries: Objects with role and content (or from and value). Content is a string, or parts: text; image_url with
            a path or a data: URI; image with its file, or as a place; video.
        pictures: Those of the row, in the order of their places; None reads them from it.
        read: So many of the first messages are not learned, whoever speaks.
        placed: Pictures for which no text has a place are an error; otherwise they stand before a user's first words.
        tags: What marks a place in a text.
        references: As in `Record`.

    Raises:
        BadRecord: What the row says is no chat, holds nothing to learn, or cannot be followed.
    """
    turns = [_turn(entry) for entry in entries]
    given = row_pictures(row, context.picture) if pictures is None else pictures
    said = [part for _, content, _ in turns for part in content]
    parted = not all(isinstance(part, str) for part in said)
    told = parted or placed or any(tag in part for part in said for tag in tags)
    places = _Places(given if told else (), () if parted else tags)
    messages = [
        Message(role, tuple(_filled(content, places, context)), learn and number >= read)
        for number, (role, content, learn) in enumerate(turns)
    ]
    places.check()
    if not told and (asked := next((message for message in messages if message.role == "user"), None)) is not None:
        messages[messages.index(asked)] = replace(asked, parts=(*given, *asked.parts))
    return record_of(messages, context, references)


def record_of(messages: Sequence[Message], context: RowContext, references: Iterable[str] = ()) -> Record:
    """A record, if every answer has words, every question words or pictures, and one answer is to be learned.

    Raises BadRecord.
    """
    for number, message in enumerate(messages, start=1):
        spoken = bool(message.text.strip())
        if message.role == "assistant" and not spoken:
            raise BadRecord("empty-answer", f"Turn {number}, an assistant's, is empty: leave the record out.")
        if message.role == "user" and not spoken and not any(isinstance(part, Picture) for part in message.parts):
            raise BadRecord("empty-question", f"Turn {number}, a user's, is empty: leave the record out.")
        if message.role == "system" and number > 1:
            raise BadRecord("wrong-type", f"Turn {number} is a system's: put it first.")
    answers = [message for message in messages if message.role == "assistant"]
    if not any(answer.learn for answer in answers):
        why = "No assistant's turn is to be learned" if answers else "No turn is an assistant's"
        raise BadRecord("empty-answer", f"{why}: there is nothing to learn.")
    return Record(tuple(messages), context.origin, tuple(references))


def with_system(record: Record, row: Fields) -> Record:
    """The record, led by the system prompt that a row keeps beside its turns, if it does. Raises BadRecord."""
    said = [text_of(row[name], name) for name in ("system", "system_prompt") if not _is_empty(row.get(name))]
    if not any(text.strip() for text in said):
        return record
    first = record.messages[0]
    if len({*said, *([first.text] if first.role == "system" else [])}) > 1:
        raise BadRecord("unfollowed-field", "The row has two system prompts that differ: leave one out.")
    if first.role == "system":
        return record
    return replace(record, messages=(Message("system", (Text(said[0]),)), *record.messages))


def refuse(fields: Fields, known: Mapping[str, str], what: str) -> None:
    """Raises BadRecord for a field of `known` that says something. what: its owner, for the sentence."""
    for name, remedy in known.items():
        if not _is_empty(fields.get(name)):
            raise BadRecord("unfollowed-field", f"{what} has {name}, which cannot be followed: {remedy}.")


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


def list_of(value: object, what: str) -> Sequence[object]:
    """A list or tuple. Raises BadRecord."""
    if not isinstance(value, (list, tuple)):
        raise BadRecord("wrong-type", f"{what} is {_type_name(value)}, not a list.")
    return value


def seconds_of(value: object) -> float:
    """A time in a video, in seconds from its start. Raises BadRecord."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise BadRecord("wrong-type", f"A time is {value!r:.40}, not a number of seconds.")
    return float(value)


def first_of(row: Fields, *keys: str) -> object:
    """What the first of the keys holds that holds anything: tables fill the keys that a row lacks with null."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def many(value: object) -> list[object]:
    """None, one thing or a list of them, as a list: how sets write their image columns."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def column_of(row: Fields, names: Sequence[str], what: str) -> object:
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


def _turn(entry: object) -> tuple[Role, Content, bool]:
    """Who speaks, what, and whether it is to be learned, if an assistant's."""
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
    learn = True
    for name, value in ((name, entry[name]) for name in _LEARNED if entry.get(name) is not None):
        if value not in (0, 1) or (value and role != "assistant"):
            why = "only answers are learned" if value in (0, 1) else "only 0 (read) and 1 (learned) are followed"
            raise BadRecord("unfollowed-field", f"A message by the {role} has {name} {value!r:.40}: {why}.")
        learn = learn and bool(value)
    content = first_of(entry, "content", "value")
    if not isinstance(content, (list, tuple)):
        return role, [text_of(content, "A message's content")], learn
    return role, [_part(part) for part in content], learn


def _part(part: object) -> str | Fields:
    if not isinstance(part, Mapping):
        return text_of(part, "A text part")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise BadRecord("wrong-type", f"A part is of the type {kind!r:.40}, not text, image, image_url or video.")
    return text_of(part.get("text"), "A text part") if _KINDS[kind] == "text" else part


def _filled(content: Content, places: "_Places", context: RowContext) -> Parts:
    found: Parts = []
    for part in content:
        if isinstance(part, str):
            found += places.split(part)
        elif _KINDS[part["type"]] == "image":
            value = _named(part, "image")
            found += places.next() if value is None else [context.picture(value)]
        else:
            start, end = part.get("video_start") or 0.0, part.get("video_end")
            path = context.path(_named(part, "video"), "video")
            found += context.frames(path, seconds_of(start), None if end is None else seconds_of(end), thin=True)
    # words in a row are one text to the model
    joined: Parts = []
    for part in found:
        if joined and isinstance(part, Text) and isinstance(last := joined[-1], Text):
            joined[-1] = Text(last.text + part.text)
        else:
            joined.append(part)
    return joined


def _named(part: Fields, kind: str) -> object:
    """What the part names; {"url": ...} inside counts as what it names."""
    for key in _FILES[kind]:
        value = part.get(key)
        if isinstance(value, Mapping) and "bytes" not in value:
            value = value.get("url") or value.get("path")
        if value is not None:
            return value
    return None


class _Places:
    """Deals pictures out to their places in the text, in order, and checks that the two agree.

    tags: what marks a place in plain text; none where text is only text.
    """

    def __init__(self, pictures: Iterable[Picture], tags: Sequence[str]) -> None:
        self._pictures = list(pictures)
        self._met = 0
        self._tags = tags

    def next(self) -> Parts:
        """What stands at the next place: a picture, or nothing if there are none left (`check` says so)."""
        self._met += 1
        return [*self._pictures[self._met - 1 : self._met]]

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
        given, met = len(self._pictures), self._met
        are = "is 1 picture" if given == 1 else f"are {given} pictures"
        places = "1 place" if met == 1 else f"{met} places"
        if met > given:
            what = self._tags[0] if self._tags else "the part"
            raise BadRecord(
                "tag-without-picture",
                f"The text has {places} for pictures, and there {are}: give the missing ones, or leave out {what}.",
            )
        if met < given:
            what = self._tags[0] if self._tags else "an image part"
            raise BadRecord(
                "picture-without-tag",
                f"There {are}, and the text has {places} for them: write {what} where each stands.",
            )


def _is_empty(value: object) -> bool:
    # tables fill all keys of an object
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple)) and isinstance(inner, Iterable):
        return all(map(_is_empty, inner))
    return value is None or value is False or value == ""


def _type_name(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
