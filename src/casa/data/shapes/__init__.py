"""Rows of the shapes that people have, to records: one small reader per shape, and telling them apart by their keys."""

from collections.abc import Callable, Mapping
from typing import Any

from casa.data.bad import BadRecord
from casa.data.record import Record
from casa.data.shapes.caption import CAPTION, IMAGE, caption
from casa.data.shapes.chat import chat
from casa.data.shapes.context import Context
from casa.data.shapes.fields import ROW, refuse, with_system
from casa.data.shapes.finevision import finevision
from casa.data.shapes.live_whisperx import live_whisperx
from casa.data.shapes.llava import llava
from casa.data.shapes.llava_video import llava_video
from casa.data.shapes.prompt_completion import prompt_completion
from casa.data.shapes.vqa import ANSWER, QUESTION, vqa

SHAPES: Mapping[str, Callable[[Mapping[str, Any], Context], Record]] = {
    "chat": chat,
    "llava": llava,
    "finevision": finevision,
    "llava-video": llava_video,
    "live-whisperx": live_whisperx,
    "vqa": vqa,
    "prompt-completion": prompt_completion,
    "caption": caption,
}


def parse_row(row: Any, context: Context) -> Record:
    """A record from one row of the shape that the settings name, or that its keys tell.

    Raises BadRecord, and NoRecord for a row that is none.
    """
    if isinstance(row, list):
        # a chat without anything around it, as Live-WhisperX's lines are
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise BadRecord("wrong-type", f"The row is a {type(row).__name__}, not an object with keys.")
    for known, actual in context.settings.columns.items():
        if actual not in row:
            raise BadRecord("wrong-type", f"The row has no column {actual!r}: mend columns in the settings.")
        row = {**{key: value for key, value in row.items() if key != actual}, known: row[actual]}
    refuse(row, ROW, "The row")
    shape = context.settings.shape
    return with_system(SHAPES[recognised(row) if shape == "auto" else shape](row, context), row)


def recognised(row: Mapping[str, Any]) -> str:
    """The name of the one shape that has such keys; null counts as absent. Raises BadRecord for none or several."""
    has = {key for key, value in row.items() if value is not None}
    timed = bool(has & {"words", "text_stream", "segments"})
    fits = []
    if "messages" in has:
        fits.append("live-whisperx" if _streams(row["messages"]) else "chat")
    if "texts" in has:
        fits.append("finevision")
    if "conversations" in has:
        fits += [name for name, key in (("llava-video", "video"), ("llava", "image")) if key in has] or ["llava"]
    if "video" in has and timed:
        fits.append("live-whisperx")
    if {"prompt", "completion"} <= has:
        fits.append("prompt-completion")
    # columns of a chat's row that such tables have too are notes beside it
    if not fits:
        columns = {"vqa": (QUESTION, ANSWER), "caption": (IMAGE, CAPTION)}
        fits += [name for name, pair in columns.items() if all(has & set(names) for names in pair)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise BadRecord("unknown-shape", f"The row could be {' or '.join(fits)}: name the shape.")
    keys = ", ".join(sorted(map(str, has))[:8]) or "none"
    raise BadRecord("unknown-shape", f"The row's keys ({keys}) fit no shape: name the shape, or map its columns.")


def _streams(messages: Any) -> bool:
    """Whether a chat holds timed words."""
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and part.get("type") == "text_stream":
                return True
    return False
