"""LLaVA's conversations: `from` and `value`, with <image> where each picture stands.

    {"image": "cat.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`image` is one path or a list; a row without it is text alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Message, Record, Role
from casa.data.shapes.context import Context
from casa.data.shapes.fields import is_learned, refuse
from casa.data.values import Places, first_of, list_of, record_of, role_of, row_pictures, text_of


def llava(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    refuse(row, {"videos": "name one film, in video"}, "The row")
    places = Places(row_pictures(row, context.files.picture))
    messages = [Message(role, tuple(places.split(text)), learn) for role, text, learn in said(row)]
    places.check()
    return record_of(messages, context.origin)


def said(row: Mapping[str, Any]) -> Sequence[tuple[Role, str, bool]]:
    """Who says what, and whether it is learned. Raises BadRecord."""
    turns: list[tuple[Role, str, bool]] = []
    for entry in list_of(row.get("conversations"), "conversations"):
        if not isinstance(entry, Mapping):
            raise BadRecord("wrong-type", "A turn is no object with from and value.")
        role = role_of(first_of(entry, "from", "role"))
        learn = is_learned(entry, role)
        turns.append((role, text_of(first_of(entry, "value", "content"), "A turn's value"), learn))
    return turns
