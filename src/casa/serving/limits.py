"""What a server allows, all of it settings, with defaults for a small machine; and values of clients within bounds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from casa.errors import UserError
from casa.settings import near

MIB = 2**20
NEEDED = ("fastapi", "uvicorn", "websockets")


def check_installed() -> None:
    """Raises UserError if what the server is built on, the extra `casa-vlm[serve]`, is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"the server needs {' and '.join(missing)}: install casa-vlm[serve].")


@dataclass(frozen=True)
class Limits:
    """Every figure is per server unless it says otherwise.

    sessions: live streams at once. load: share of what this machine sustains (see `load`) that they may ask for in all;
    2 lets twice as many frames in, of which half are dropped.
    connections: open WebSockets, with a stream or without one yet.
    frame_bytes: one encoded frame. message_bytes: one JSON message. body_bytes: one HTTP body.
    decoded_pixels: pictures with more are refused unread, frame_pixels: frames of a stream with more.
    picture_pixels: larger ones are made smaller before the model sees them.
    frames_per_second, messages_per_second: of one stream; bursts of two seconds' worth pass.
    faults: wrong messages in a row before a stream is closed.
    questions: of one stream that may wait. prompt_chars: of a prompt or question.
    new_tokens: the longest caption that a stream may ask for. text_tokens: what a stream remembers unless it asks for
    less or more, up to max_text_tokens.
    chats: completions at once. waiting_chats: more that may wait for their turn, each with its body in memory.
    chat_tokens: the longest answer. prompt_tokens, chat_pictures: of one chat.
    chat_choices: answers that one request may ask for. video_frames, video_fps: frames of a video in a chat, in all and
    per second. video_seconds: for decoding them.
    hello_seconds: for a stream's first message. idle_seconds: without any message. ping_seconds: between two pings, and
    for the answer to one. send_seconds: for one event to be taken by a reader. body_seconds: for a request to arrive.
    fetch_seconds: for a picture from elsewhere to arrive.
    caption_seconds, answer_seconds: the most that one caption or answer of a stream may take from its first token on.
    outbox: events that wait for a slow reader. captions: remembered of one stream.
    ended_streams, ended_seconds: how many streams that have ended keep their captions for download, and how long.
    """

    sessions: int = 16
    load: float = 1.0
    connections: int = 64
    frame_bytes: int = 4 * MIB
    message_bytes: int = 64 * 1024
    body_bytes: int = 16 * MIB
    decoded_pixels: int = 24_000_000
    frame_pixels: int = 9_000_000
    picture_pixels: int = 1024 * 1024
    frames_per_second: float = 30.0
    messages_per_second: float = 90.0
    faults: int = 20
    questions: int = 4
    prompt_chars: int = 2000
    new_tokens: int = 128
    text_tokens: int = 1024
    max_text_tokens: int = 8192
    chats: int = 8
    waiting_chats: int = 16
    chat_tokens: int = 1024
    prompt_tokens: int = 8192
    chat_pictures: int = 16
    chat_choices: int = 8
    video_frames: int = 8
    video_fps: float = 2.0
    video_seconds: float = 10.0
    hello_seconds: float = 10.0
    idle_seconds: float = 300.0
    ping_seconds: float = 20.0
    send_seconds: float = 20.0
    body_seconds: float = 30.0
    fetch_seconds: float = 10.0
    caption_seconds: float = 2.0
    answer_seconds: float = 5.0
    outbox: int = 64
    captions: int = 20_000
    ended_streams: int = 64
    ended_seconds: float = 900.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{field.name} is {value}; a limit is a number above 0.")

    @classmethod
    def parse(cls, given: Iterable[str]) -> "Limits":
        """Limits from texts such as "frame_bytes=1000000". Raises UserError for a wrong name or value."""
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        found: dict[str, Any] = {}
        for text in given:
            name, _, value = text.partition("=")
            if name not in kinds:
                raise UserError(f"there is no limit {name!r}; {near(name, kinds, 'the limits are')}")
            try:
                found[name] = kinds[name](value)
            except ValueError as error:
                kind = "a whole number" if kinds[name] is int else "a number"
                raise UserError(f"{name} is {value!r}; give {kind}.") from error
        return cls(**found)


def words(message: Mapping[str, Any], name: str, limits: Limits) -> str:
    """A text that is there and not too long."""
    text = message.get(name)
    if not isinstance(text, str) or not text.strip() or len(text) > limits.prompt_chars:
        raise UserError(f"{name} is a text of 1 to {limits.prompt_chars} characters.")
    return readable(text)


def readable(text: str) -> str:
    """A text that can be encoded: half of a surrogate pair can be written in JSON and read by no tokenizer."""
    return text.encode("utf-8", "replace").decode("utf-8")


def number(message: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number within bounds; the default if it is not there."""
    if (value := message.get(name)) is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} is a number from {low:g} to {high:g}.")
    return value


def whole_number(message: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    """The same without a fraction."""
    if (value := message.get(name)) is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name} is a whole number from {low:g} to {high:g}.")
    return value
