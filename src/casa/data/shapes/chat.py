"""Chat messages as OpenAI's and Hugging Face's libraries write them.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}],
     "images": ["cat.jpg"]}

Content is a string, or parts: text; image_url with a path or a data: URI; image with its file, or as a place that the
`images` column fills. In a chat without image parts, <image> in a string is such a place.
"""

from collections.abc import Mapping
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Record, Text
from casa.data.shapes.context import Context
from casa.data.values import Parts, Places, Turns, first_of, list_of, many, record_of, role_of, seconds_of, text_of

_IMAGE = ("image", "image_url", "input_image")
_VIDEO = ("video", "video_url", "input_video")
_TEXT = ("text", "input_text", "output_text")


def chat(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    turns = [_turn(entry) for entry in list_of(row.get("messages"), "messages")]
    column = many(row.get("images")) or many(row.get("image"))
    # where pictures stand as parts of their own, <image> in a text is only text
    parted = any(_type(part) in (*_IMAGE, *_VIDEO) for _, content in turns for part in _parts(content))
    places = Places(map(context.files.picture, column), None if parted else "<image>")
    read: Turns = [(role_of(role), _content(content, places, context)) for role, content in turns]
    places.check()
    return record_of(read, context.origin)


def _turn(entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping):
        raise BadRecord("wrong-type", "A message is no object with role and content.")
    who = first_of(entry, "role", "from")
    if who is None:
        raise BadRecord("wrong-type", "A message has no role: say who speaks.")
    return who, first_of(entry, "content", "value")


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
