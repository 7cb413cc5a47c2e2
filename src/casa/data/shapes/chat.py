"""Chat messages as OpenAI's and Hugging Face's libraries write them.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}],
     "images": ["cat.jpg"]}

Content is a string, or parts: text; image_url with a path or a data: URI; image with its file, or as a place that the
`images` column fills. In a chat without image parts, <image> in a string is such a place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Message, Record, Role, Text
from casa.data.shapes.context import Context
from casa.data.shapes.fields import is_learned, refuse
from casa.data.values import (
    TAG,
    Parts,
    Places,
    first_of,
    list_of,
    pictures_before,
    record_of,
    role_of,
    row_pictures,
    seconds_of,
    text_of,
)

_IMAGE = ("image", "image_url", "input_image")
_VIDEO = ("video", "video_url", "input_video")
_FILMS = ("video", "videos")
_TEXT = ("text", "input_text", "output_text")


def chat(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    return record_of(messages_of(list_of(row.get("messages"), "messages"), row, context), context.origin)


def messages_of(
    entries: Sequence[Any], row: Mapping[str, Any], context: Context, *, read: int = 0, placed: bool = True
) -> list[Message]:
    """Messages with the pictures of their row.

    read: so many of the first are not learned, whoever speaks. placed: pictures for which the text has no place are an
    error; otherwise they stand before a user's first words. Raises BadRecord.
    """
    refuse(row, dict.fromkeys(_FILMS, "write it as a part of the content, {type: video, video: ...}"), "The row")
    turns = [_turn(entry) for entry in entries]
    # where pictures stand as parts of their own, <image> in a text is only text
    parted = any(_type(part) in (*_IMAGE, *_VIDEO) for _, content, _ in turns for part in _parts(content))
    pictures = row_pictures(row, context.files.picture)
    bare = not placed and not parted
    places = Places([] if bare else pictures, None if parted or bare else TAG)
    found = [
        Message(role, tuple(_content(content, places, context)), learn and number >= read)
        for number, (role, content, learn) in enumerate(turns)
    ]
    places.check()
    return pictures_before(found, pictures) if bare else found


def _turn(entry: Any) -> tuple[Role, Any, bool]:
    if not isinstance(entry, Mapping):
        raise BadRecord("wrong-type", "A message is no object with role and content.")
    who = first_of(entry, "role", "from")
    if who is None:
        raise BadRecord("wrong-type", "A message has no role: say who speaks.")
    role = role_of(who)
    return role, first_of(entry, "content", "value"), is_learned(entry, role)


def _parts(content: Any) -> list[Any]:
    return list(content) if isinstance(content, (list, tuple)) else []


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else "text"


def _content(content: Any, places: Places, context: Context) -> Parts:
    if not isinstance(content, (list, tuple)):
        return places.split(text_of(content, "A message's content"))
    found: Parts = []
    for part in content:
        kind = _type(part)
        if isinstance(part, str):
            found += places.split(text_of(part, "A text part"))
        elif kind in _TEXT:
            found += places.split(text_of(part.get("text"), "A text part"))
        elif kind in _IMAGE:
            value = _named(part, "image", "image_url", "url", "path", "bytes")
            found += places.next() if value is None else [context.files.picture(value)]
        elif kind in _VIDEO:
            value = _named(part, "video", "video_url", "url", "path")
            path = context.files.path(value, "video")
            start, end = part.get("video_start") or 0.0, part.get("video_end")
            found += context.frames(path, seconds_of(start), None if end is None else seconds_of(end), thin=True)
        else:
            known = "text, image, image_url or video"
            raise BadRecord("wrong-type", f"A part is of the type {kind!r:.40}, not {known}.")
    # words in a row are one text to the model
    return _joined(found)


def _named(part: Mapping[str, Any], *keys: str) -> Any:
    """The first of the keys that holds something; {"url": ...} inside counts as what it names."""
    for key in keys:
        value = part.get(key)
        if isinstance(value, Mapping) and "bytes" not in value:
            value = value.get("url") or value.get("path")
        if value is not None:
            return value
    return None


def _joined(parts: Parts) -> Parts:
    found: Parts = []
    for part in parts:
        if found and isinstance(part, Text) and isinstance(found[-1], Text):
            found[-1] = Text(found[-1].text + part.text)
        else:
            found.append(part)
    return found
