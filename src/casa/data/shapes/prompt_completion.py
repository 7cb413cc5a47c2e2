"""A prompt and its completion, as TRL writes them: two texts, or the two parts of a chat.

    {"prompt": "What is it?", "completion": "A cat.", "images": ["cat.jpg"]}
    {"prompt": [{"role": "user", "content": "What is it?"}], "completion": [{"role": "assistant", "content": "A cat."}]}

The completion is learned, and an assistant's turns in the prompt are not. Of two texts, the user says the first. Where
no place for the pictures is told, they stand before the first question.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Record
from casa.data.shapes.chat import messages_of
from casa.data.shapes.context import Context
from casa.data.values import list_of, record_of


def prompt_completion(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row. Raises BadRecord."""
    if row.get("label") is False:
        raise BadRecord("unfollowed-field", "The row has label false, a bad answer: leave the record out.")
    asked = _turns(row.get("prompt"), "user", "prompt")
    said = _turns(row.get("completion"), "assistant", "completion")
    messages = messages_of([*asked, *said], row, context, read=len(asked), placed=False)
    return record_of(messages, context.origin)


def _turns(value: Any, role: str, what: str) -> Sequence[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list_of(value, what)
