"""A chat completion as the OpenAI interface writes it: read, checked, and turned into this model's messages.

What this server cannot do is refused by name, never left out in silence.
"""

import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from casa.errors import UserError
from casa.serving.limits import Limits
from casa.serving.pictures import read_address
from casa.serving.stream_messages import readable
from casa.streaming import Sampling

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# of no consequence to what is answered
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
CHARS_PER_TOKEN = 8  # more than that on average is no text that a tokenizer has met
MARKS_PER_CHAR = 8  # commas and opening brackets of JSON: a letter in a part of its own, in a message of its own
KNOWN = {
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
}


class RequestError(UserError):
    """A wrong request. param: which part of it; code: OpenAI's name for what is wrong, if there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class ChatRequest:
    """messages: for the processor's chat template, pictures opened. pictures: how many there are."""

    messages: list[dict[str, Any]]
    pictures: int
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_body(body: bytes, limits: Limits) -> Any:
    """What the body's JSON says. Raises RequestError for what is none, or has more values than any chat in bounds.

    Python reads JSON in one go, with every other thread waiting: what can only be refused is not read.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MARKS_PER_CHAR * _most_chars(limits):
        raise _too_long("messages")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is no JSON.") from error


def read_chat(body: Any, name: str, limits: Limits, allow_fetch: bool) -> ChatRequest:
    """A request from its JSON. Raises RequestError. Opens pictures, so it is no work for an event loop."""
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object; send model and messages.")
    for key, value in body.items():
        if key not in KNOWN | IGNORED and value not in (None, False, 0, [], {}):
            shown = readable(key[:80])
            raise RequestError(f"{shown} is not supported; leave it out.", shown, "unsupported_parameter")
    if body.get("model") != name:
        given = str(body.get("model"))[:80]
        raise RequestError(f"there is no model {given!r} here, only {name!r}.", "model", "model_not_found", 404)
    if body.get("n") not in (None, 1):
        raise RequestError("n is 1 here; ask again for another answer.", "n", "unsupported_value")
    stream = body.get("stream") or False
    options = body.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise RequestError("stream is true or false, and stream_options an object.", "stream")
    messages, pictures = _messages(body.get("messages"), limits, allow_fetch)
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    return ChatRequest(
        messages=messages,
        pictures=pictures,
        max_tokens=min(
            limits.chat_tokens, int(_number(body.get(limit), limit, 1, 1_000_000, limits.chat_tokens, True))
        ),
        sampling=Sampling(
            temperature=_number(body.get("temperature"), "temperature", 0, 2, 0.0),
            # 0 keeps the likeliest token, which is what the smallest positive number does
            top_p=max(1e-6, _number(body.get("top_p"), "top_p", 0, 1, 1.0)),
        ),
        seed=int(_number(body.get("seed"), "seed", -(2**63), 2**63 - 1, 0, True)),
        stop=_stop(body.get("stop")),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
    )


def _number(value: Any, name: str, low: float, high: float, default: float, whole: bool = False) -> float:
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name} is {kind} from {low:g} to {high:g}.", name, "invalid_value")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value or []
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop):
        raise RequestError("stop is a string, or up to four of them, of 1 to 100 characters.", "stop", "invalid_value")
    return tuple(stop)


def _messages(given: Any, limits: Limits, allow_fetch: bool) -> tuple[list[dict[str, Any]], int]:
    if not isinstance(given, list) or not given:
        raise RequestError("messages is a list of at least one message.", "messages")
    # a message is a token at the least
    if len(given) > limits.prompt_tokens:
        raise _too_long("messages")
    messages, pictures, chars = [], 0, 0
    for number, message in enumerate(given):
        where = f"messages.{number}"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(f"a message has a role: {', '.join(ROLES)}.", where)
        parts = _parts(message.get("content"), where)
        pictures += sum(part["type"] == "image_url" for part in parts)
        if pictures > limits.chat_pictures:
            raise RequestError(f"a chat has at most {limits.chat_pictures} pictures here.", where)
        # an empty part is work too
        chars += sum(max(1, len(part["text"])) if isinstance(part.get("text"), str) else 1 for part in parts)
        if chars > _most_chars(limits):
            raise _too_long(where)
        content = [_part(part, f"{where}.content", limits, allow_fetch) for part in parts]
        messages.append({"role": ROLES[role], "content": content})
    if messages[-1]["role"] != "user":
        raise RequestError("the last message is the user's, which is answered.", "messages")
    return messages, pictures


def _most_chars(limits: Limits) -> int:
    return CHARS_PER_TOKEN * limits.prompt_tokens


def _too_long(where: str) -> RequestError:
    return RequestError("the chat is too long for this server; shorten it.", where, "context_length_exceeded")


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise RequestError("content is a text, or a list of parts.", f"{where}.content")
    for part in parts:
        if part.get("type") not in ("text", "image_url"):
            raise RequestError("a part of a message is of type text or image_url.", f"{where}.content")
    return parts


def _part(part: dict[str, Any], where: str, limits: Limits, allow_fetch: bool) -> dict[str, Any]:
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise RequestError("a text part has a text.", where)
        return {"type": "text", "text": readable(part["text"])}
    picture = part.get("image_url")
    address = picture.get("url") if isinstance(picture, dict) else picture
    if not isinstance(address, str):
        raise RequestError("an image_url part has an image_url with a url.", where)
    try:
        image: Image.Image = read_address(address, limits, allow_fetch)
    except UserError as error:
        raise RequestError(str(error), where, "invalid_image") from error
    return {"type": "image", "image": image}
