"""A chat completion as the OpenAI interface writes it: read, checked, and turned into this model's messages.

Every field is obeyed, or taken because what it says asks for nothing, or refused by name; none is left out in silence.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from PIL import Image

from casa.errors import UserError
from casa.serving.limits import Limits, number, readable
from casa.serving.pictures import read_address, read_video
from casa.streaming import Sampling

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
CHARS_PER_TOKEN = 8  # more than that on average is no text that a tokenizer has met
MARKS_PER_CHAR = 8  # commas and opening brackets of JSON: a letter in a part of its own, in a message of its own
DETAILS = {"auto": None, "high": None, "original": None, "low": 512}  # of a picture: its longest side in px
KINDS = ("text", "image_url", "video_url")  # of the parts of a message
EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})

MAX_TOKENS = ("max_tokens", "max_completion_tokens")  # of both the smaller counts
OBEYED = {
    *("model", "messages", *MAX_TOKENS, "temperature", "top_p", "top_k", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "n", "logprobs", "top_logprobs", "stream", "stream_options"),
}
# Who asks, and how OpenAI may charge and cache it: of no consequence to what is answered.
ASIDE = {
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), str),
    **dict.fromkeys(("metadata", "prompt_cache_options"), dict),
}
# What asks for nothing, of fields that are refused otherwise: OpenAI's own defaults, written out. null always does.
NOTHING: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "logit_bias": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),  # even without a word in them they ask for a search
}


class RequestError(UserError):
    """A wrong request. param: which part of it; code: OpenAI's name for what is wrong, if there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class ChatRequest:
    """What is asked for, checked."""

    messages: list[dict[str, Any]]  # for the processor's chat template, pictures opened
    max_tokens: int  # of the longest answer
    sampling: Sampling
    seed: int  # of the draws
    stop: tuple[str, ...]  # texts before which an answer ends
    stream: bool  # whether it is told in pieces
    include_usage: bool  # whether a stream ends with counts of tokens
    choices: int = 1  # answers wanted
    top_logprobs: int | None = None  # how many of the likeliest tokens are told beside each; None tells no logprobs
    obfuscate: bool = False  # whether events get random characters, so that their sizes tell nobody what is in them


def parse_body(body: bytes, limits: Limits) -> Any:
    """What the body's JSON says. Raises RequestError for what is none, or has more values than any chat in bounds.

    Python reads JSON in one go, with every other thread waiting: what can only be refused is not read.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MARKS_PER_CHAR * CHARS_PER_TOKEN * limits.prompt_tokens:
        raise _too_long("messages")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is no JSON.") from error


def read_chat(body: Any, name: str, limits: Limits, allow_fetch: bool) -> ChatRequest:
    """A request from its JSON. Raises RequestError. Opens pictures, so it is no work for an event loop.

    Without a seed, a fresh one is drawn.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object; send model and messages.")
    for key, value in body.items():
        _check_field(key, value)
    if body.get("model") != name:
        given = str(body.get("model"))[:80]
        raise RequestError(f"there is no model {given!r} here, only {name!r}.", "model", "model_not_found", 404)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError("stream_options is an object.", "stream_options")
    _check_rest(options, {"include_usage", "include_obfuscation"}, "stream_options")
    stream, logprobs = _flag(body, "stream"), _flag(body, "logprobs")
    obfuscate = _flag(options, "include_obfuscation", "stream_options.")
    for where, wanted, needed, has in (
        ("top_logprobs", body.get("top_logprobs"), "logprobs", logprobs),
        ("stream_options.include_obfuscation", obfuscate, "stream", stream),
    ):
        if wanted and not has:
            raise RequestError(f"{where} needs {needed} to be true.", where, "invalid_value")
    try:
        # the cheap parts first: pictures are opened last
        found: dict[str, Any] = {
            "max_tokens": min(limits.chat_tokens, *(number(int, body, limit, 1, 10**6, 10**6) for limit in MAX_TOKENS)),
            "sampling": Sampling(
                temperature=number(float, body, "temperature", 0, 2, 0.0),
                # 0 keeps the likeliest token, which is what the smallest positive number does
                top_p=max(1e-6, number(float, body, "top_p", 0, 1, 1.0)),
                # vLLM's -1 is all of them, too
                top_k=max(0, number(int, body, "top_k", -1, 1_000_000, 0)),
                presence_penalty=number(float, body, "presence_penalty", -2, 2, 0.0),
                frequency_penalty=number(float, body, "frequency_penalty", -2, 2, 0.0),
            ),
            "seed": number(int, body, "seed", -(2**63), 2**63 - 1, secrets.randbits(62)),
            "stop": _stop(body.get("stop")),
            "stream": stream,
            "include_usage": _flag(options, "include_usage", "stream_options."),
            "choices": number(int, body, "n", 1, limits.chat_choices, 1),
            "top_logprobs": number(int, body, "top_logprobs", 0, 20, 0) if logprobs else None,
            "obfuscate": obfuscate,
        }
    except RequestError:
        raise
    except UserError as error:
        raise RequestError(str(error), ".".join(error.fields), "invalid_value") from error
    return ChatRequest(messages=_messages(body.get("messages"), limits, allow_fetch), **found)


def _check_field(key: str, value: Any) -> None:
    """Raises RequestError for a field that asks for what this server does not do."""
    if key in OBEYED or value is None:
        return
    shown = readable(key[:80])
    if key in ASIDE:
        if not isinstance(value, ASIDE[key]):
            kind = "a text" if ASIDE[key] is str else "an object"
            raise RequestError(f"{key} is {kind}.", key, "invalid_type")
    elif key in NOTHING:
        # the types count: 0 is not False
        if not any(type(value) is type(known) and value == known for known in NOTHING[key]):
            known = [json.dumps(known) for known in NOTHING[key] if known or known is False]
            only = f", but for {' or '.join(known)}" if known else ""
            raise RequestError(f"{key} is not supported here{only}; leave it out.", key, "unsupported_parameter")
    elif value not in EMPTY:
        raise RequestError(f"{shown} is not supported; leave it out.", shown, "unsupported_parameter")


def _check_rest(given: dict[str, Any], known: set[str], where: str) -> None:
    """Raises RequestError for what an object of the request says besides `known`; null and the like say nothing."""
    for key, value in given.items():
        if key not in known and value not in EMPTY:
            shown = readable(key[:80])
            sentence = f"{where} has {shown}, which is not supported; leave it out."
            raise RequestError(sentence, f"{where}.{shown}", "unsupported_parameter")


def _flag(given: dict[str, Any], name: str, where: str = "") -> bool:
    value = given.get(name)
    if not isinstance(value, bool | None):
        raise RequestError(f"{where}{name} is true or false.", where + name, "invalid_type")
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value or []
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop):
        raise RequestError("stop is a string, or up to four of them, of 1 to 100 characters.", "stop", "invalid_value")
    return tuple(stop)


def _messages(given: Any, limits: Limits, allow_fetch: bool) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise RequestError("messages is a list of at least one message.", "messages")
    # a message is a token at the least
    if len(given) > limits.prompt_tokens:
        raise _too_long("messages")
    messages, room, chars = [], limits.chat_pictures, CHARS_PER_TOKEN * limits.prompt_tokens
    for place, message in enumerate(given):
        where = f"messages.{place}"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(f"a message has a role: {', '.join(ROLES)}.", where)
        _check_rest(message, {"role", "content", "refusal"}, where)
        parts = _parts(message, role, where)
        waiting = sum(part["type"] != "text" for part in parts)
        if waiting > room:
            raise RequestError(f"a chat has at most {limits.chat_pictures} pictures here.", where)
        # an empty part is work too
        chars -= sum(max(1, len(part["text"])) if isinstance(part.get("text"), str) else 1 for part in parts)
        if chars < 0:
            raise _too_long(where)
        content: list[dict[str, Any]] = []
        for part in parts:
            waiting -= part["type"] != "text"
            read = _part(part, f"{where}.content", room - waiting, limits, allow_fetch)
            room -= sum(one["type"] == "image" for one in read)
            content += read
        messages.append({"role": ROLES[role], "content": content})
    if messages[-1]["role"] != "user":
        raise RequestError("the last message is the user's, which is answered.", "messages")
    return messages


def _too_long(where: str) -> RequestError:
    return RequestError("the chat is too long for this server; shorten it.", where, "context_length_exceeded")


def _parts(message: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """What a message holds, as a list of parts whose types are known."""
    content, refusal = message.get("content"), message.get("refusal")
    if content is None and role == "assistant":
        # it said nothing, or why it would not
        content = refusal or ""
    elif refusal:
        raise RequestError("a message has a content or a refusal, and only an assistant refuses.", f"{where}.refusal")
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(given, list) or not given or not all(isinstance(part, dict) for part in given):
        raise RequestError("content is a text, or a list of parts.", f"{where}.content")
    parts = []
    for part in given:
        if part.get("type") == "refusal":  # is what the assistant said
            part = {**part, "type": "text", "text": part.get("refusal"), "refusal": None}
        if part.get("type") not in KINDS:
            raise RequestError(f"a part of a message is of type {', '.join(KINDS)}.", f"{where}.content")
        # where OpenAI may cache a prompt is of no consequence to what is answered
        _check_rest(part, {"type", part["type"], "prompt_cache_breakpoint"}, f"{where}.content")
        parts.append(part)
    return parts


def _part(part: dict[str, Any], where: str, room: int, limits: Limits, allow_fetch: bool) -> list[dict[str, Any]]:
    """The part as the chat template takes it; a video becomes its frames, as pictures, at most `room`."""
    kind = part["type"]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RequestError("a text part has a text.", where)
        return [{"type": "text", "text": readable(part["text"])}]
    source = part.get(kind)
    source = {"url": source} if isinstance(source, str) else source
    if not isinstance(source, dict) or not isinstance(source.get("url"), str):
        raise RequestError(f"a part of type {kind} has {kind} with a url.", where)
    _check_rest(source, {"url", "detail"} if kind == "image_url" else {"url"}, f"{where}.{kind}")
    detail = source.get("detail") or "auto"
    if not isinstance(detail, str) or detail not in DETAILS:
        raise RequestError(f"detail is one of {', '.join(DETAILS)}.", f"{where}.{kind}.detail", "invalid_value")
    try:
        if kind == "video_url":
            found = read_video(source["url"], limits, allow_fetch, room)
        else:
            found = [read_address(source["url"], limits, allow_fetch)]
    except UserError as error:
        raise RequestError(str(error), where, "invalid_image") from error
    if (side := DETAILS[detail]) is not None:
        for picture in found:
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return [{"type": "image", "image": picture} for picture in found]
