"""What a chat template takes, found out by rendering, and chats put as it takes them.

a chat      [system: S] [user: picture, "Read it."]
parts       the template writes a place for a picture (`<image>`, `<|image_pad|>`): parts are given as they are
text        it knows only text, or writes something else: the place is written into the text that it is given
no system   it has no turn for a system message, or refuses one: what it says opens the user's next turn
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from casa.errors import UserError

_TEXT = ("text", "input_text", "output_text")
_IMAGE = ("image", "image_url", "input_image")
_VIDEO = ("video", "video_url", "input_video")
# where a part keeps its picture, and where an object there keeps it
_CONTENT = ("image", "image_url", "url", "path", "base64", "bytes")
_WORDS = ("730251", "48062")  # digits come out of any filter as they are

Messages = list[dict[str, Any]]


def read_chat(chat: Any) -> tuple[Messages, list[Any]]:
    """A chat as messages whose parts are {"type": "text", "text": ...} or {"type": "image"}, and its pictures in order.

    Parts are those of transformers and of OpenAI: text; image with `image`, `url`, `path` or `base64`; image_url, whose
    address may stand in an object. A picture is None where it is given elsewhere. A message's keys that hold None are
    left out.
    Raises UserError for messages and parts of other kinds.
    """
    if not isinstance(chat, (list, tuple)) or not chat or not all(isinstance(message, Mapping) for message in chat):
        raise UserError("a chat is a list of messages, at least one, each a dict with role and content.")
    messages, pictures = [], []
    for given in chat:
        message = {key: value for key, value in given.items() if value is not None}
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [_part(part) for part in content]
            pictures += [picture for part, picture in parts if part["type"] == "image"]
            message["content"] = [part for part, _ in parts]
        messages.append(message)
    return messages, pictures


def _part(part: Any) -> tuple[dict[str, Any], Any]:
    """A part without its picture, and the picture."""
    if isinstance(part, str):
        return {"type": "text", "text": part}, None
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT:
        if not isinstance(part.get("text"), str):
            raise UserError("a text part has a text: {'type': 'text', 'text': '...'}.")
        return {**part, "type": "text"}, None
    if kind in _IMAGE:
        picture = next((part[key] for key in _CONTENT if part.get(key) is not None), None)
        if isinstance(picture, Mapping):
            picture = next((picture[key] for key in _CONTENT if picture.get(key) is not None), None)
        if picture is None and kind != "image":
            raise UserError(f"an {kind} part has no address of a picture: {{'type': 'image_url', 'image_url': '...'}}.")
        return {"type": "image"} | {
            key: value for key, value in part.items() if key not in ("type", *_CONTENT)
        }, picture
    if kind in _VIDEO:
        raise UserError("a video is read frame by frame; give its frames as image parts.")
    shown = f"of the type {kind!r:.60}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
    raise UserError(f"a part of a message is {shown}; give parts of the type text, image or image_url.")


@dataclass(frozen=True)
class TemplateForm:
    """What a template takes.

    places: writes the image token for an image part. strings, parts: writes a content that is a string, or a list of
    text parts. system: has a turn for a system message.
    """

    places: bool
    strings: bool
    parts: bool
    system: bool

    def fit(self, messages: Messages, place: str) -> Messages:
        """The same chat in this form. place: what stands for a picture where the template writes nothing for it."""
        fitted = messages if self.system else _without_system(messages)
        return [
            {**message, "content": self._content(message["content"], place)} if "content" in message else message
            for message in fitted
        ]

    def _content(self, content: Any, place: str) -> Any:
        listed = isinstance(content, list)
        if not listed and not isinstance(content, str):
            return content
        if self.places and self.parts if listed else self.strings:
            return content
        parts = content if listed else [{"type": "text", "text": content}]
        if self.places and self.parts:
            return parts
        texts = [{"type": "text", "text": place} if part["type"] == "image" else part for part in parts]
        return "".join(part["text"] for part in texts) if self.strings or not self.parts else texts


@lru_cache(maxsize=64)
def template_form(template: str, image_token: str, variables: tuple[tuple[str, Any], ...] = ()) -> TemplateForm:
    """Renders probes with a chat template. variables: what else templates see, as (name, value).

    image_token: what is to come out for a picture.
    """
    word, other = _WORDS

    def rendered(*turns: tuple[str, Any]) -> str:
        chat = [{"role": role, "content": content} for role, content in turns]
        try:
            return render(template, chat, add_generation_prompt=True, **dict(variables))
        except Exception:  # a template may do anything with what it does not expect
            return ""

    def text(words: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": words}]

    strings = word in rendered(("user", word))
    listed = rendered(("user", text(word)))
    # a template for strings writes a list as Python or JSON does
    parts = word in listed and not any(f"{quote}type{quote}" in listed for quote in "'\"")
    shown = rendered(("user", [{"type": "image"}, *text(word)]))
    made: Callable[[str], Any] = str if strings or not parts else text
    told = rendered(("system", made(word)), ("user", made(other)))
    return TemplateForm(
        places=parts and word in shown and shown.count(image_token) == 1,
        strings=strings,
        parts=parts,
        # some take whatever is not the user's for the assistant's
        system=word in told and told != rendered(("assistant", made(word)), ("user", made(other))),
    )


def render(template: str, chat: Messages, **settings: Any) -> str:
    """One chat, by transformers' own means. Raises jinja2's errors, and those of the template itself."""
    (text,), _ = render_jinja_template([chat], chat_template=template, **settings)
    return text


def _without_system(messages: Messages) -> Messages:
    """The same chat with what a system says at the beginning of the user's next turn."""
    found: Messages = []
    told: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content", "")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if message.get("role") == "system":
            told += [*parts, {"type": "text", "text": "\n"}]
        elif message.get("role") == "user" and told:
            found.append({**message, "content": told + parts})
            told = []
        else:
            found.append(message)
    return [*found, {"role": "user", "content": told[:-1]}] if told else found


def named_template(chosen: str | None, templates: Sequence[Any], tools: bool = False) -> str:
    """The text of a template. chosen: a name or a text; None for the default. templates: texts, or texts by name.

    tools: whether functions are offered, for which some have a template of their own. Raises UserError.
    """
    by_name: dict[str, str] = {}
    for held in reversed([held for held in templates if held]):
        by_name |= held if isinstance(held, Mapping) else {"default": held}
    if chosen is None:
        chosen = "tool_use" if tools and "tool_use" in by_name else "default"
    elif chosen not in by_name and "{" in chosen:
        return chosen
    if chosen not in by_name:
        known = f"there are {', '.join(sorted(by_name))}" if by_name else "the processor has none"
        raise UserError(f"there is no chat template {chosen!r:.60}: {known}; give a name, or a template's text.")
    return by_name[chosen]
