"""FineVision's rows: a list of pictures, and questions and answers about them.

    {"images": ["cat.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}]}

The pictures stand before the first question, unless <image> tags say otherwise.
"""

from collections.abc import Mapping
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Message, Record, Text
from casa.data.shapes.context import Context
from casa.data.shapes.fields import is_learned
from casa.data.values import list_of, pictures_before, record_of, row_pictures, text_of


def finevision(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    messages: list[Message] = []
    for entry in list_of(row.get("texts"), "texts"):
        if not isinstance(entry, Mapping):
            raise BadRecord("wrong-type", "An entry of texts is no object with user and assistant.")
        learn = is_learned(entry, "assistant")
        asked, said = (text_of(entry.get(side), side) for side in ("user", "assistant"))
        messages.append(Message("user", (Text(asked),) if asked.strip() else ()))
        messages.append(Message("assistant", (Text(said),) if said.strip() else (), learn))
    pictures = row_pictures(row, context.files.picture)
    return record_of(pictures_before(messages, pictures), context.origin)
