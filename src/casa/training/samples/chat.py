"""A conversation as tokens, through the model's own chat template: answers are learned, up to their stop token.

    rendered    <user><image><frame>Read it.<end><assistant>«407»<end>      « » mark answers while rendering
    learned                                                  ++++++++       and are taken out again

The whole conversation is rendered and encoded once, so its tokens are those that the processor would feed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from PIL import Image

from casa.data.bad import BadRecord
from casa.data.record import Message, Picture
from casa.errors import UserError
from casa.models import CasaProcessor

# characters that Unicode keeps for private use, which text of people does not hold
_OPENS, _CLOSES = "\uf8f0", "\uf8f1"


@dataclass(frozen=True)
class Tokens:
    """ids, learn and places as in `Sample`. pictures: those that the text still needs, in order."""

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    places: tuple[int, ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Stop:
    """What ends an answer. token: the id that a model gives then. text: what the template writes there, or None."""

    token: int
    text: str | None


def stop_of(processor: CasaProcessor, given: int | None = None) -> Stop:
    """given: the model's own stop token (`generation_config.eos_token_id`), where it is not the tokenizer's.

    Raises UserError if there is none.
    """
    token = given if given is not None else processor.tokenizer.eos_token_id
    if token is None:
        raise UserError("the tokenizer has no eos_token, which ends answers; set one.")
    tokenizer, text = processor.tokenizer, None
    probe = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": _CLOSES}]},
    ]
    # a template that refuses even this refuses every record, each with its own sentence
    with suppress(TemplateError):
        behind = processor.apply_chat_template(probe, tokenize=False, add_generation_prompt=False)
        behind = behind.partition(_CLOSES)[2].lstrip()
        specials = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        text = next((special for special in specials if special and behind.startswith(special)), None)
    return Stop(int(token), text)


def chat_tokens(messages: Sequence[Message], processor: CasaProcessor, stop: Stop) -> Tokens:
    """Raises BadRecord if nothing is answered, or if text and pictures do not fit the template."""
    text, spans = _rendered(messages, processor)
    # what follows the last answer is read by nobody
    text, closed = _with_stops(text, spans, stop)
    ends = [last for _, last in spans]
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = []
    learn: list[bool] = []
    places: list[int] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == processor.image_token_id:
            places.append(len(ids))
            ids += processor.gist_ids
            learn += [False] * len(processor.gist_ids)
        else:
            ids.append(token)
            # the first piece of an answer that ends behind the token's start; they are in order and apart
            answer = bisect_right(ends, start)
            learn.append(answer < len(spans) and end > spans[answer][0])
    if not closed:
        ids.append(stop.token)
        learn.append(True)
    pictures = [part for message in messages for part in message.parts if isinstance(part, Picture)]
    if len(places) > len(pictures):
        raise BadRecord(
            "tag-without-picture", f"A text holds {processor.image_token}, which stands for a picture: take it out."
        )
    if text.count(processor.image_token) != len(places):
        raise BadRecord("broken-text", "The template's places for pictures are lost in its tokens.")
    return Tokens(tuple(ids), tuple(learn), tuple(places), tuple(pictures[: len(places)]))


def _rendered(messages: Sequence[Message], processor: CasaProcessor) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and (start, end) of each piece of an answer in it."""
    blank = Image.new("RGB", (1, 1))  # templates only ask whether there is a picture
    chat: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Picture):
                content.append({"type": "image", "image": blank})
                continue
            if _OPENS in part.text or _CLOSES in part.text:
                raise BadRecord("broken-text", "A text holds characters that Unicode keeps for private use.")
            learned = message.role == "assistant" and message.learn and part.text.strip()
            text = f"{_OPENS}{part.text.strip()}{_CLOSES}" if learned else part.text
            content.append({"type": "text", "text": text})
        chat.append({"role": message.role, "content": content})
    try:
        marked = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        raise BadRecord("wrong-type", f"The model's chat template refuses this conversation: {error}") from error
    text, spans = "", []
    for number, piece in enumerate(marked.replace(_CLOSES, _OPENS).split(_OPENS)):
        if number % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    if not spans:
        raise BadRecord("empty-answer", "No assistant says anything: there is nothing to learn.")
    return text, spans


def _with_stops(text: str, spans: list[tuple[int, int]], stop: Stop) -> tuple[str, bool]:
    """Stretches spans over the stop token behind them, and cuts the text behind the last.

    Returns the text, and whether a stop token ends it.
    """
    closed = False
    for number, (first, last) in enumerate(spans):
        behind = text[last:].lstrip()
        closed = stop.text is not None and behind.startswith(stop.text)
        if closed:
            spans[number] = (first, len(text) - len(behind) + len(stop.text or ""))
    return text[: spans[-1][1]], closed
