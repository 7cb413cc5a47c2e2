"""LLaVA's conversations: `from` and `value`, with <image> where each picture stands.

    {"image": "cat.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`image` is one path or a list; a row without it is text alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Record, Role
from casa.data.shapes.context import Context
from casa.data.values import Places, Turns, first_of, list_of, many, record_of, role_of, text_of


def llava(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    pictures = many(row.get("image")) or many(row.get("images"))
    places = Places(map(context.files.picture, pictures))
    turns: Turns = [(role, places.split(text)) for role, text in said(row)]
    places.check()
    return record_of(turns, context.origin)


def said(row: Mapping[str, Any]) -> Sequence[tuple[Role, str]]:
    """Who says what. Raises BadRecord."""
    turns: list[tuple[Role, str]] = []
    for entry in list_of(row.get("conversations"), "conversations"):
        if not isinstance(entry, Mapping):
            raise BadRecord("wrong-type", "A turn is no object with from and value.")
        who, what = first_of(entry, "from", "role"), first_of(entry, "value", "content")
        turns.append((role_of(who), text_of(what, "A turn's value")))
    return turns
