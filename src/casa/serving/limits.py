"""What a server allows, all of it settings, with defaults for a small machine; and values of clients within bounds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, TypeVar

from casa.errors import UserError
from casa.settings import near

MIB = 2**20
NEEDED = ("fastapi", "uvicorn", "websockets", "httpx", "prometheus_client")
Number = TypeVar("Number", int, float)


def check_installed(extra: str = "serve") -> None:
    """Raises UserError if what the server is built on is not installed: the extra `casa-vlm[serve]`, or "cluster"."""
    needed = (*NEEDED, "ray") if extra == "cluster" else NEEDED
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"the server needs {' and '.join(missing)}: install casa-vlm[{extra}].")


@dataclass(frozen=True)
class Limits:
    """Every figure is per server unless it says otherwise. docs/serving.md, "Limits", says more of each."""

    sessions: int = 16  # live streams at once
    load: float = 1.0  # share of what this machine sustains that they may ask for in all; at 2 half is dropped
    connections: int = 64  # open WebSockets, with a stream or without one yet
    frame_bytes: int = 4 * MIB  # one encoded frame
    message_bytes: int = 64 * 1024  # one JSON message
    body_bytes: int = 16 * MIB  # one HTTP body
    decoded_pixels: int = 24_000_000  # pictures with more are refused unread,
    frame_pixels: int = 9_000_000  # and frames of a stream with more than this
    picture_pixels: int = 1024 * 1024  # larger ones are made smaller before the model sees them
    frames_per_second: float = 30.0  # of one stream; bursts of two seconds' worth pass, here and below
    messages_per_second: float = 90.0
    faults: int = 20  # wrong messages in a row before a stream is closed
    questions: int = 4  # of one stream that may wait
    prompt_chars: int = 2000  # of a prompt or question
    new_tokens: int = 128  # the longest caption that a stream may ask for
    text_tokens: int = 1024  # what a stream remembers unless it asks for less or more,
    max_text_tokens: int = 8192  # up to this
    chats: int = 8  # completions at once
    waiting_chats: int = 16  # more that may wait for their turn, each with its body in memory
    chat_tokens: int = 1024  # the longest answer
    prompt_tokens: int = 8192  # of one chat, its pictures included
    chat_pictures: int = 16  # of one chat, the frames of its videos included
    chat_choices: int = 8  # answers that one request may ask for
    video_frames: int = 8  # of a video in a chat, in all
    video_fps: float = 2.0  # and per second
    video_seconds: float = 10.0  # for decoding them
    hello_seconds: float = 10.0  # for a stream's first message
    idle_seconds: float = 300.0  # without any message
    ping_seconds: float = 20.0  # between two pings, and for the answer to one
    send_seconds: float = 20.0  # for one event to be taken by a reader
    body_seconds: float = 30.0  # for a request to arrive
    fetch_seconds: float = 10.0  # for a picture from elsewhere to arrive
    caption_seconds: float = 2.0  # the most that a stream's caption may take from its first token on,
    answer_seconds: float = 5.0  # and an answer
    outbox: int = 64  # events that wait for a slow reader
    captions: int = 20_000  # remembered of one stream
    ended_streams: int = 64  # streams that have ended and keep their captions for download
    ended_seconds: float = 900.0  # and how long

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{field.name} is {value}; a limit is a number above 0.")

    @classmethod
    def parse(cls, given: Iterable[str]) -> "Limits":
        """Limits from texts such as "frame_bytes=1000000". Raises UserError for a wrong name or value."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        found: dict[str, Any] = {}
        for text in given:
            name, _, value = text.partition("=")
            if name not in kinds:
                raise UserError(f"there is no limit {name!r}; {near(name, kinds, 'the limits are')}")
            try:
                found[name] = int(value) if kinds[name] is int else float(value)
            except ValueError as error:
                kind = "a whole number" if kinds[name] is int else "a number"
                raise UserError(f"{name} is {value!r}; give {kind}.") from error
        return cls(**found)


def words(message: Mapping[str, Any], name: str, limits: Limits) -> str:
    """A text that is there and not too long."""
    text = message.get(name)
    if not isinstance(text, str) or not text.strip() or len(text) > limits.prompt_chars:
        raise UserError(f"{name} is a text of 1 to {limits.prompt_chars} characters.", field=name)
    return readable(text)


def readable(text: str) -> str:
    """A text that can be encoded: half of a surrogate pair can be written in JSON and read by no tokenizer."""
    return text.encode("utf-8", "replace").decode("utf-8")


def number(
    kind: type[Number], message: Mapping[str, Any], name: str, low: float, high: float, default: Number
) -> Number:
    """A float or an int within bounds; the default if it is not there. Raises UserError for anything else."""
    if (value := message.get(name)) is None:
        return default
    known = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, known) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} is {what} from {low:g} to {high:g}.", field=name)
    return kind(value)
