"""FineVision's rows: a list of pictures, and questions and answers about them.

    {"images": ["cat.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}]}

The pictures stand before the first question, unless <image> tags say otherwise.
"""

from collections.abc import Mapping
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Record, Role
from casa.data.shapes.context import Context
from casa.data.values import TAG, Places, Turns, list_of, many, record_of, text_of


def finevision(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    said: list[tuple[Role, str]] = []
    for entry in list_of(row.get("texts"), "texts"):
        if not isinstance(entry, Mapping):
            raise BadRecord("wrong-type", "An entry of texts is no object with user and assistant.")
        said.append(("user", text_of(entry.get("user"), "user")))
        said.append(("assistant", text_of(entry.get("assistant"), "assistant")))
    pictures = [context.files.picture(value) for value in many(row.get("images"))]
    tagged = any(TAG in text for _, text in said)
    places = Places(pictures if tagged else [])
    turns: Turns = [(role, places.split(text)) for role, text in said]
    places.check()
    if turns and not tagged:
        turns[0] = (turns[0][0], [*pictures, *turns[0][1]])
    return record_of(turns, context.origin)
