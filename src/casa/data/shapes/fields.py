"""Fields beside the words that change what is learned: followed where a record can say so, refused by name where not.

    followed    weight, train, training, loss of a message      an answer that is read and not learned
                system, system_prompt of a row                  a system's turn before all others
    refused     what stands in `ROW` and `MESSAGE`              tools, pairs of good and bad answers, sound, ...
    passed over every other key                                 id, source, score: notes of whoever made the set

An empty field (null, "", [], {}, false) says nothing. docs/data.md tells the same.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Message, Record, Role, Text
from casa.data.values import text_in, text_of

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
    "name": "templates know no names: write into the words who speaks",
    "refusal": "write it as the answer's words, or leave the record out",
    "rejected": _PAIR,
    "chosen": _PAIR,
}
_LEARNED = ("weight", "train", "training", "loss")
_SYSTEM = ("system", "system_prompt")


def refuse(fields: Mapping[str, Any], known: Mapping[str, str], what: str) -> None:
    """Raises BadRecord for a field of `known` that says something. what: its owner, for the sentence."""
    for name, remedy in known.items():
        if name in fields and not _is_empty(fields[name]):
            raise BadRecord("unfollowed-field", f"{what} has {name}, which cannot be followed: {remedy}.")


def is_learned(message: Mapping[str, Any], role: Role) -> bool:
    """Whether a message is to be learned, if an assistant's. Raises BadRecord for what cannot be followed."""
    refuse(message, MESSAGE, "A message")
    if message.get("mask") is not None:
        raise BadRecord(
            "unfollowed-field", "A message has mask, which sets read in two ways: write train: true or false instead."
        )
    given = {name: message[name] for name in _LEARNED if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRecord(
                "unfollowed-field", f"A message has {name} {value!r:.40}: only 0 (read) and 1 (learned) are followed."
            )
        if value and role != "assistant":
            raise BadRecord(
                "unfollowed-field", f"A message has {name} {value!r:.40} and is a {role}'s: only answers are learned."
            )
    return all(given.values())


def with_system(record: Record, row: Mapping[str, Any]) -> Record:
    """The record, led by the system prompt that a row keeps beside its turns, if it does. Raises BadRecord."""
    said = [text_of(row[name], name) for name in _SYSTEM if not _is_empty(row.get(name))]
    if not any(text.strip() for text in said):
        return record
    first = record.messages[0]
    if first.role == "system":
        said.append(text_in(first))
    if len(set(said)) > 1:
        raise BadRecord("unfollowed-field", "The row has two system prompts that differ: leave one out.")
    if first.role == "system":
        return record
    return replace(record, messages=(Message("system", (Text(said[0]),)), *record.messages))


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        # tables fill all keys of an object
        return all(map(_is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    return value is None or value is False or value == ""
