"""What a chat template takes, found out by rendering, and chats put as it takes them; what people type is text."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, islice
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from casa.errors import UserError

# private-use characters: people's texts seldom hold them, and those of one chat are chosen among the ones it lacks
_PRIVATE = range(0xF8F0, 0xE000, -1)
_NAMES = ("role", "type")  # by which templates choose, of a message and of a part


class ChatText(str):
    """A rendered chat. typed: (start, end) of what was typed in it and only looks like a special token.

    An empty span is a border over which no special token reaches. All string methods give a plain str, without spans.
    """

    typed: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, text: str, typed: Iterable[tuple[int, int]] = ()) -> "ChatText":
        found = cls(text)
        found.typed = tuple(typed)
        return found


class TypedText:
    """A tokenizer's special tokens, told apart from the same words typed by people.

    Args:
        also: Tokens that are special here, although the tokenizer does not call them so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, also: tuple[str, ...] = ()) -> None:
        added = list(tokenizer.added_tokens_decoder.values())
        special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens, *also}
        # a token of blanks is no word that anybody types to mean it
        known = tokenizer.get_vocab()
        self._special: dict[str, int] = {token: known[token] for token in special if token.strip() and token in known}
        alone = {token.content for token in added if token.single_word}
        self._typed = re.compile(_any_of(map(str.lower, self._special), set()), re.IGNORECASE)
        self._written = re.compile(_any_of({*self._special, *(token.content for token in added)} - {""}, alone))
        self._beginnings = {
            token[:end].lower() for token in self._special for end in range(1, len(token)) if token[:end].strip()
        }
        self._longest = max(map(len, self._special), default=1)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if isinstance(backend, Tokenizer) else None
        self._mark = "".join(chr(_PRIVATE[secrets.randbelow(len(_PRIVATE))]) for _ in range(4))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, also: tuple[str, ...] = ()) -> "TypedText":
        """The one of this tokenizer, kept until tokens are added to it."""
        key = (len(tokenizer), tuple(tokenizer.all_special_tokens), also)
        kept = _KEPT.get(tokenizer)
        if kept is None or kept[0] != key:
            kept = _KEPT[tokenizer] = (key, cls(tokenizer, also))
        return kept[1]

    def marks(self, *values: Any) -> "Marks":
        """Marks for what is typed in these values: strings, and lists and dicts of them."""
        return Marks(self._typed, self._ends_open, free_marks(2, *values))

    def _ends_open(self, text: str) -> bool:
        """Whether a special token could go on behind this text, in whatever the template writes next."""
        tail = text[-self._longest :].lower()
        return any(tail[start:] in self._beginnings for start in range(len(tail)))

    def count(self, text: str, token: str) -> int:
        """How often a special token stands in a text, apart from those that were typed."""
        return self.spell(text).count(self.spelling(token))

    def spell(self, text: str) -> str:
        """The text as `encode_spelled` takes it: special tokens that nobody typed have their private spelling."""
        pieces, at = [], 0
        for start, end in (*getattr(text, "typed", ()), (len(text), len(text))):
            pieces += [self._written.sub(self._spelled, text[at:start]), text[start:end]]
            at = end
        return "".join(pieces)

    def spelling(self, token: str) -> str:
        """The private spelling of a special token."""
        return self._mark + token

    def unspell(self, spelled: str) -> str:
        """A spelled text as people read it."""
        return spelled.replace(self._mark, "")

    def _spelled(self, found: re.Match[str]) -> str:
        return self._mark + found[0] if found[0] in self._special else found[0]

    def encode_spelled(self, spelled: str) -> Encoding:
        """Token ids and offsets (of all characters, blanks too) of a spelled text; no token is added to it.

        Raises NotImplementedError for a tokenizer written in Python.
        """
        return self._twin.encode(spelled, add_special_tokens=False)

    def encode(self, tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, in which what was typed is text.

        Args:
            tokenizer: The one that this is of, whose ids any text has in which nothing like a special token was typed.
        """
        typed = getattr(text, "typed", ())
        if not typed:
            return list(tokenizer.encode(str(text), add_special_tokens=add_special_tokens))
        if self._backend is None:
            found, at = [], 0
            for start, end in (*typed, (len(text), len(text))):
                for piece, as_text in ((text[at:start], False), (text[start:end], True)):
                    found += tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=as_text)
                at = end
            return tokenizer.build_inputs_with_special_tokens(found) if add_special_tokens else found
        encoding = self.encode_spelled(self.spell(text))
        if add_special_tokens:
            encoding = self._backend.post_process(encoding, add_special_tokens=True)
        return list(encoding.ids)

    @cached_property
    def _twin(self) -> Tokenizer:
        """The same tokenizer, whose special tokens have private spellings, under the same ids."""
        if self._backend is None:
            raise NotImplementedError("only tokenizers of the tokenizers library tell where their tokens stand.")
        told = json.loads(self._backend.to_str())
        # what is added around a text, and offsets without blanks, are matters of the tokenizer itself
        told |= {"truncation": None, "padding": None, "post_processor": None}
        model = told["model"]
        if isinstance(model["vocab"], dict):
            self._respell_words(model)
        else:
            self._respell_pieces(model["vocab"])
        known = {entry["content"]: entry for entry in told["added_tokens"]}
        plain = {"single_word": False, "lstrip": False, "rstrip": False}
        respelled = [
            {**(known.get(token) or plain), "id": number, "content": self._mark + token}
            | {"normalized": False, "special": True}
            for token, number in self._special.items()
        ]
        others = [entry for entry in told["added_tokens"] if entry["content"] not in self._special]
        told["added_tokens"] = sorted([*others, *respelled], key=lambda entry: entry["id"])
        return Tokenizer.from_str(json.dumps(told))

    def _respell_words(self, model: dict[str, Any]) -> None:
        """Of BPE, WordPiece and WordLevel: no word and no merge spells a special token any more."""
        for token, number in self._special.items():
            # the unknown is named by its word
            if token != model.get("unk_token"):
                model["vocab"].pop(token, None)
            model["vocab"][self._mark + token] = number
        if model.get("merges"):
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [[one, two] for one, two in pairs if not {one, two, one + two} & self._special.keys()]

    def _respell_pieces(self, vocabulary: list[list[Any]]) -> None:
        """Of Unigram, whose ids are places in a list: what has no place there yet gets one."""
        last = max(self._special.values(), default=-1)
        # no text holds them; 0 is no score that any other piece's chance is reckoned from
        vocabulary += [[f"{self._mark}{number}", 0.0] for number in range(len(vocabulary), last + 1)]
        for token, number in self._special.items():
            vocabulary[number][0] = self._mark + token


_KEPT: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, TypedText]] = WeakKeyDictionary()


class Marks:
    """A pair of private-use characters around whatever looks like a special token in what people typed in one chat."""

    def __init__(self, typed: re.Pattern[str], ends_open: Any, marks: str) -> None:
        self._typed, self._ends_open = typed, ends_open
        self._open, self._close = marks

    def mark(self, value: Any) -> Any:
        """The same value with its strings marked, those of lists and of dicts too (not their keys, roles and types)."""
        if isinstance(value, str):
            # two texts in a row must not become one token, whatever blanks a template takes away between them
            body = value.rstrip()
            end = self._close if self._ends_open(body) else ""
            return self._typed.sub(f"{self._open}\\g<0>{self._close}", body) + end + value[len(body) :]
        if isinstance(value, dict):
            return {key: held if key in _NAMES else self.mark(held) for key, held in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(held) for held in value]
        return value

    def read(self, rendered: str) -> ChatText:
        """A rendered text without its marks. Templates may have changed, moved, cut or repeated what was marked."""
        for mark in (self._open, self._close):
            rendered = rendered.replace(f"\\u{ord(mark):04x}", mark)  # as JSON may have it
        pieces: list[str] = []
        typed: list[tuple[int, int]] = []
        opened, length = None, 0
        for piece in re.split(f"([{self._open}{self._close}])", rendered):
            if piece not in (self._open, self._close):
                pieces.append(piece)
                length += len(piece)
            elif piece == self._close and opened is not None and self._typed.fullmatch(pieces[-1]):
                typed.append((opened, length))
                opened = None
            else:
                # a mark that lost its other half is a border all the same
                typed += [(place, place) for place in (opened, length) if place is not None]
                opened = length if piece == self._open else None
        if opened is not None:
            typed.append((opened, opened))
        return ChatText.of("".join(pieces), typed)


def free_marks(count: int, *values: Any) -> str:
    """So many private-use characters that stand in none of the strings of these values."""
    used = set().union(*map(_characters, values))
    return "".join(islice((mark for mark in map(chr, _PRIVATE) if mark not in used), count))


def _characters(value: Any) -> set[str]:
    """The private-use characters of a value's strings."""
    if isinstance(value, str):
        return set(_USED.findall(value))
    held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*map(_characters, held))


_USED = re.compile(f"[{chr(_PRIVATE[-1])}-{chr(_PRIVATE[0])}]")


def _any_of(words: Iterable[str], alone: set[str]) -> str:
    """A pattern for any of the words, the longest at each place. alone: those that are never part of a word."""
    found = [_branches(sorted(set(words) - alone))]
    if within := sorted(set(words) & alone):
        found.append(rf"(?<!\w){_branches(within)}(?!\w)")
    return "|".join(found)


def _branches(words: list[str]) -> str:
    """The same for sorted words, each letter tried once: there may be thousands that begin alike."""
    if len(words) < 2:
        return re.escape(words[0]) if words else "(?!)"
    ends, found = not words[0], []
    for letter, group in groupby(filter(None, words), key=lambda word: word[0]):
        found.append(re.escape(letter) + _branches([word[1:] for word in group]))
    return f"(?:{'|'.join(found)}){'?' if ends else ''}"


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

    Attributes:
        places: Writes the image token for an image part.
        strings, parts: Writes a content that is a string, or a list of text parts.
        system: Has a turn for a system message.
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
    """Renders probes with a chat template.

    Args:
        variables: What else templates see, as (name, value).
        image_token: What is to come out for a picture.
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
    """The text of a template.

    Args:
        chosen: A name or a text; None for the default.
        templates: Texts, or texts by name.
        tools: Whether functions are offered, for which some have a template of their own.

    Raises:
        UserError: There is none of that name, or none at all.
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
