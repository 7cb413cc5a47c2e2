"""What a client of /v1/streams may say in JSON: read and checked, with one plain sentence for what is wrong.

hello, first    {"type": "hello", "prompt": ..., "fps": 2, "max_text_tokens": ..., "max_new_tokens": ..., "seed": 0,
                 "sampling": {"temperature": 0.7, ...}, "token": ...}     all of it optional
then            {"type": "frame", "time": 1.5}     where the next binary message stands in the video, in seconds
                {"type": "ask", "question": "..."}
                {"type": "pause"}   {"type": "resume"}   {"type": "close"}
"""

import json
import math
import secrets
from dataclasses import dataclass, fields
from typing import Any

from casa.errors import UserError
from casa.serving.limits import Limits
from casa.streaming import Sampling

KEYS = {
    "hello": {"prompt", "fps", "max_text_tokens", "max_new_tokens", "sampling", "seed", "token"},
    "frame": {"time"},
    "ask": {"question"},
    "pause": set(),
    "resume": set(),
    "close": set(),
}
LONGEST_VIDEO = 365 * 24 * 3600.0


@dataclass(frozen=True)
class Hello:
    """What a client asks of its stream. settings: StreamingSession's."""

    fps: float
    settings: dict[str, Any]
    token: str


def read_message(text: str, limits: Limits) -> dict[str, Any]:
    """A JSON object with a known type and nothing that this type does not have. Raises UserError otherwise."""
    if len(text) > limits.message_bytes:
        raise UserError(f"a message has at most {limits.message_bytes} characters.")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("this is no JSON; text messages are JSON objects, and frames are binary.") from error
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise UserError(f"a message is a JSON object whose type is one of {', '.join(KEYS)}.")
    if unknown := sorted(message.keys() - KEYS[kind] - {"type"}):
        known = ", ".join(sorted(KEYS[kind])) or "nothing else"
        raise UserError(f"a message of type {kind} has no {unknown[0][:80]!r}; it has {known}.")
    return message


def read_hello(message: dict[str, Any], limits: Limits, fps: float, bounded: bool = True) -> Hello:
    """The first message. fps: unless the client says otherwise. bounded: whether text has a bound unless it says so.
    Without a seed, a fresh one is drawn.

    Raises UserError for values out of bounds.
    """
    if message["type"] != "hello":
        raise UserError("the first message is of type hello.")
    bound = int(number(message, "max_text_tokens", 1, limits.most_text_tokens, limits.text_tokens, whole=True))
    settings: dict[str, Any] = {
        "max_text_tokens": bound if bounded or message.get("max_text_tokens") is not None else None,
        "max_new_tokens": int(
            number(message, "max_new_tokens", 1, limits.new_tokens, min(32, limits.new_tokens), whole=True)
        ),
        "seed": int(number(message, "seed", 0, 2**63 - 1, secrets.randbits(62), whole=True)),
        "sampling": _sampling(message.get("sampling")),
    }
    if message.get("prompt") is not None:
        settings["prompt"] = words(message, "prompt", limits)
    token = message.get("token")
    return Hello(
        fps=number(message, "fps", 0.01, limits.frames_per_second, fps),
        settings=settings,
        token=token if isinstance(token, str) else "",
    )


def read_time(message: dict[str, Any]) -> float:
    """Where the next frame stands in its video, in seconds."""
    if message.get("time") is None:
        raise UserError("a frame message has a time.")
    return number(message, "time", 0, LONGEST_VIDEO, 0.0)


def words(message: dict[str, Any], name: str, limits: Limits) -> str:
    """A text that is there and not too long."""
    text = message.get(name)
    if not isinstance(text, str) or not text.strip() or len(text) > limits.prompt_chars:
        raise UserError(f"{name} is a text of 1 to {limits.prompt_chars} characters.")
    return readable(text)


def readable(text: str) -> str:
    """A text that can be encoded: half of a surrogate pair can be written in JSON and read by no tokenizer."""
    return text.encode("utf-8", "replace").decode("utf-8")


def number(
    message: dict[str, Any], name: str, low: float, high: float, default: float, *, whole: bool = False
) -> float:
    """A number within bounds; the default if it is not there."""
    value = message.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high or not math.isfinite(value):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {kind} from {low:g} to {high:g}.")
    return value


def _sampling(given: Any) -> Sampling:
    if given is None:
        return Sampling()
    known = {field.name for field in fields(Sampling)}
    if not isinstance(given, dict) or not given.keys() <= known:
        raise UserError(f"sampling is an object with any of {', '.join(sorted(known))}.")
    read: dict[str, Any] = {}
    for name in given:
        whole = isinstance(getattr(Sampling, name), int)
        value = number(given, name, -1000, 1000, getattr(Sampling, name), whole=whole)
        read[name] = int(value) if whole else float(value)
    return Sampling(**read)
