"""LLaVA-Video's rows: a video, and a conversation in which one tag stands for all of its frames.

    {"video": "kitchen.mp4",
     "conversations": [{"from": "human", "value": "<image>\\nWhat happens?"}, {"from": "gpt", "value": "Eggs fry."}]}

The tag is <image>, as in LLaVA-Video-178K, or <video>.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from casa.data.record import Message, Picture, Record
from casa.data.shapes.context import Context
from casa.data.shapes.llava import said
from casa.data.values import TAG, Places, record_of


def llava_video(row: Mapping[str, Any], context: Context) -> Record:
    """Reads one row, and its video once all else is right. Raises BadRecord."""
    video = Picture(context.files.path(row.get("video"), "video"))
    places = Places([video])
    turns = [Message(role, tuple(places.split(text.replace("<video>", TAG))), learn) for role, text, learn in said(row)]
    places.check()
    record = record_of(turns, context.origin)
    assert not isinstance(video.source, bytes)
    frames = context.frames(video.source, thin=True)
    messages = [
        replace(message, parts=tuple(p for part in message.parts for p in (frames if part is video else [part])))
        for message in record.messages
    ]
    return replace(record, messages=tuple(messages))
