"""A conversation as tokens, through the model's own chat template: what is learned begins where a model is asked.

    prompt     <user><image><frame>Read it.<end><assistant>          as rendered and encoded when it is asked
    whole      <user><image><frame>Read it.<end><assistant> «407»<end>
    learned                                                ++++++++  from the prompt's end to the stop, the blank too

« » mark answers while the template is rendered, and are taken out again. The prompt of the last answer has the very
tokens that the processor feeds; the rest of the whole follows. Answers of earlier turns stand in that prompt, and are
learned there from where their own prompts ended, up to the stop that the template wrote.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError

from casa.data.bad import BadRecord
from casa.data.record import Message, Picture, Text
from casa.errors import UserError
from casa.models import CasaProcessor
from casa.models.chat_template import TypedText, free_marks

Span = tuple[int, int]

# texts of which one joins no given text in a token; the last is none, for a tokenizer that joins them all
_AHEAD = ("\n", ":", "x", "0", "")


@dataclass(frozen=True)
class Tokens:
    """ids, learn and places as in `Sample`. pictures: those that the text still needs, in order."""

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    places: tuple[int, ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Stop:
    """How answers begin and end. token: the id that a model gives at the end. text: what the template writes there, or
    None. lead: what it writes between its generation prompt and an answer. notes: sentences about what of its answers
    cannot be learned as it stands, and what is learned instead.
    """

    token: int
    text: str | None
    lead: str = ""
    notes: tuple[str, ...] = ()


def stop_of(processor: CasaProcessor, given: int | None = None) -> Stop:
    """Finds out by rendering. given: the model's own stop token (`generation_config.eos_token_id`), where it is not the
    tokenizer's.

    Raises UserError if there is none, and for a tokenizer that does not tell where its tokens stand.
    """
    token = given if given is not None else processor.tokenizer.eos_token_id
    if token is None:
        raise UserError("the tokenizer has no eos_token, which ends answers; set one.")
    typed = processor.typed_text
    try:
        typed.encode_spelled("")
    except NotImplementedError as error:
        raise UserError("training needs a tokenizer of the tokenizers library, not one in Python.") from error
    turns = [_say("user", "730251"), _say("assistant", "48062"), _say("user", "1"), _say("assistant", "2")]
    try:
        first, one = (_written(turns[:number], processor, number == 1) for number in (1, 2))
        second, two = (_written(turns[:number], processor, number == 3) for number in (3, 4))
        start, end = one.spans[-1]
    except (BadRecord, IndexError):
        # a template that refuses even this refuses every record, each with its own sentence
        return Stop(int(token), None)
    behind = one.text[end:].lstrip()
    known = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}
    ends = sorted(filter(None, known), key=len, reverse=True)
    text = next((special for special in ends if behind.startswith(typed.spell(special))), None)
    lead = one.text[len(first.text) : start] if start is not None and one.text.startswith(first.text) else ""
    stop = Stop(int(token), text, lead)
    return replace(stop, notes=tuple(_notes(typed, stop, first, one, second, two)))


def _notes(
    typed: TypedText, stop: Stop, first: "_Written", one: "_Written", second: "_Written", two: "_Written"
) -> Iterator[str]:
    """first, second: prompts of the first and of a second turn; one, two: these turns, answered."""
    turns = ((first.text, one.text), (second.text, two.text))
    if apart := [prompt[_shared(prompt, whole) :] for prompt, whole in turns if not whole.startswith(prompt)]:
        yield (
            f"the chat template's generation prompt ends with {typed.unspell(apart[0])!r}, which a finished chat has "
            "not: an answer's words and its stop are learned right behind that prompt"
        )
    elif not second.text.startswith(one.text[: _stopped(typed, one.text, one.spans[-1][1], stop)[0]]):
        yield (
            "the chat template writes answers of earlier turns otherwise than the last one: of those, their words and "
            "the stop are learned"
        )
    if stop.text is None:
        yield "the chat template writes no token that ends an answer: only the last answer of a chat learns to stop"
    if any(_behind(typed, first.text, stop.lead + word)[1] for word in ("48062", "yes", "Yes", "the", "a")):
        yield (
            "the tokenizer joins the end of the generation prompt with the beginning of an answer: the last answer of "
            "a chat is encoded by itself, behind the prompt; those of earlier turns begin within a token"
        )


def chat_tokens(messages: Sequence[Message], processor: CasaProcessor, stop: Stop) -> Tokens:
    """Raises BadRecord if nothing is answered, or if text and pictures do not fit the template."""
    last = max((number for number, message in enumerate(messages) if _learned(message)), default=None)
    if last is None:
        raise BadRecord("empty-answer", "No assistant says anything: there is nothing to learn.")
    row = _Row(processor)
    # what follows the last answer is read by nobody
    prompt, rest = _cut(messages[: last + 1], processor, stop)
    typed = processor.typed_text
    encoding = typed.encode_spelled(prompt.text)
    row.add(encoding.ids, encoding.offsets, _earlier(prompt, typed, processor, stop))
    (ids, offsets), _ = _behind(typed, prompt.text, rest.text)
    row.add(ids, offsets, rest.spans)
    if not rest.closed:
        row.ids.append(stop.token)
        row.learn.append(True)
    pictures = [part for message in messages[: last + 1] for part in message.parts if isinstance(part, Picture)]
    wanted = sum(text.text.count(typed.spelling(processor.image_token)) for text in (prompt, rest))
    if len(row.places) != wanted:
        raise BadRecord("broken-text", "The template's places for pictures are lost in its tokens.")
    return Tokens(tuple(row.ids), tuple(row.learn), tuple(row.places), tuple(pictures[:wanted]))


def answer_tokens(asked: str, said: str, processor: CasaProcessor, stop: Stop) -> list[int]:
    """What a model says to a question, behind the template's generation prompt, without the stop."""
    prompt, rest = _cut([_say("user", asked), _say("assistant", said)], processor, stop)
    (ids, _), _ = _behind(processor.typed_text, prompt.text, rest.text[: rest.words])
    return ids


@dataclass(frozen=True)
class _Written:
    """A rendered chat, in `TypedText`'s spelling. spans: (start, end) of each piece of an answer in it; start is None
    if the template has cut it away.
    """

    text: str
    spans: list[tuple[int | None, int]]


@dataclass(frozen=True)
class _Answer:
    """What follows the prompt of an answer. spans: what of it is learned. words: where its words end. closed: whether
    the template wrote a stop behind them.
    """

    text: str
    spans: list[Span]
    words: int
    closed: bool


def _written(messages: Sequence[Message], processor: CasaProcessor, prompt: bool) -> _Written:
    """prompt: with the generation prompt. Raises BadRecord."""
    texts = [part.text for message in messages for part in message.parts if isinstance(part, Text)]
    # nor may they stand in the private spelling, in which the chat is cut at them
    opens, closes = free_marks(2, texts, processor.typed_text.spelling(""))
    chat: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Picture):
                content.append({"type": "image"})
                continue
            learned = message.role == "assistant" and message.learn and part.text.strip()
            text = f"{opens}{part.text.strip()}{closes}" if learned else part.text
            content.append({"type": "text", "text": text})
        chat.append({"role": message.role, "content": content})
    try:
        rendered = processor.apply_chat_template(chat, add_generation_prompt=prompt)
    except UserError as error:
        raise BadRecord("broken-text", f"{error}") from error
    except TemplateError as error:
        raise BadRecord("wrong-type", f"The model's chat template refuses this conversation: {error}") from error
    except Exception as error:  # a template may do anything with what it does not expect
        raise BadRecord("wrong-type", f"The model's chat template fails at this conversation: {error}") from error
    spans: list[tuple[int | None, int]] = []
    pieces: list[str] = []
    length, start = 0, None
    for piece in re.split(f"([{opens}{closes}])", processor.typed_text.spell(rendered)):
        if piece == opens:
            start = length
        elif piece == closes:
            spans.append((start, length))
            start = None
        else:
            pieces.append(piece)
            length += len(piece)
    return _Written("".join(pieces), spans)


def _cut(messages: Sequence[Message], processor: CasaProcessor, stop: Stop) -> tuple[_Written, _Answer]:
    """A chat that ends with an answer, as the prompt of that answer and what follows, up to its stop.

    Raises BadRecord if the template loses the answer.
    """
    typed = processor.typed_text
    whole = _written(messages, processor, False)
    answers = sum(bool(isinstance(part, Text) and part.text.strip()) for part in messages[-1].parts)
    spans = whole.spans[-answers:]
    if not spans:
        raise BadRecord("broken-text", "The model's chat template leaves the last answer out.")
    start, words = spans[0][0], spans[-1][1]
    until, closed = _stopped(typed, whole.text, words, stop)
    # where nobody asks, the answer stands where the template puts it
    asked = len(messages) > 1
    prompt = _written(messages[:-1], processor, True) if asked else _Written(whole.text[: start or 0], [])
    border: int | None = len(prompt.text)
    if not (whole.text.startswith(prompt.text) and border <= words):
        border = start
    if border is None:
        raise BadRecord("broken-text", "The model's chat template cuts the beginning of the last answer away.")
    # a picture before the first words is seen, and not said
    seen = start is not None and typed.spelling(processor.image_token) in whole.text[border:start]
    learned = []
    for number, (first, last) in enumerate(spans):
        begin = border if first is None or (number == 0 and not seen) else first
        learned.append((begin - border, _stopped(typed, whole.text, last, stop)[0] - border))
    return prompt, _Answer(whole.text[border:until], learned, words - border, closed)


def _earlier(prompt: _Written, typed: TypedText, processor: CasaProcessor, stop: Stop) -> list[Span]:
    """Where answers of earlier turns are learned in a prompt: with what leads to them, and their stops."""
    found: list[Span] = []
    for start, end in prompt.spans:
        if start is not None:
            lead = len(stop.lead) if prompt.text[:start].endswith(stop.lead) else 0
            found.append((start - lead, _stopped(typed, prompt.text, end, stop)[0]))
    return found


def _stopped(typed: TypedText, text: str, end: int, stop: Stop) -> tuple[int, bool]:
    """Where the stop behind an answer's end ends; that end, and False, if the template wrote none."""
    behind = text[end:].lstrip()
    written = typed.spell(stop.text) if stop.text is not None else None
    if written is None or not behind.startswith(written):
        return end, False
    return len(text) - len(behind) + len(written), True


def _behind(typed: TypedText, before: str, text: str) -> tuple[tuple[list[int], list[Span]], bool]:
    """Token ids of a text that follows another, with their places in it; and whether one of its tokens would begin
    before it, so that it had to be encoded without that other text.
    """
    choices = [before, *_AHEAD]
    while True:
        ahead = choices.pop(0)
        encoding, length = typed.encode_spelled(ahead + text), len(ahead)
        first = next((at for at, (start, _) in enumerate(encoding.offsets) if start >= length), len(encoding.ids))
        if not choices or all(end <= length for _, end in encoding.offsets[:first]):
            break
    offsets = [(start - length, end - length) for start, end in encoding.offsets[first:]]
    return (list(encoding.ids[first:]), offsets), ahead is not before


class _Row:
    """Tokens so far, and where pictures stand among them."""

    def __init__(self, processor: CasaProcessor) -> None:
        self._image, self._gist = processor.image_token_id, processor.gist_ids
        self.ids: list[int] = []
        self.learn: list[bool] = []
        self.places: list[int] = []

    def add(self, ids: Sequence[int], offsets: Sequence[Span], learned: Sequence[Span]) -> None:
        """offsets: where each token stands; learned: the spans of what is learned, in order and apart."""
        ends = [last for _, last in learned]
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token == self._image:
                self.places.append(len(self.ids))
                self.ids += self._gist
                self.learn += [False] * len(self._gist)
            else:
                self.ids.append(token)
                # the first span that ends behind the token's start
                span = bisect_right(ends, start)
                self.learn.append(span < len(learned) and end > learned[span][0])


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _learned(message: Message) -> bool:
    """Whether a message is an answer that is to be learned, and holds words."""
    said = (part.text for part in message.parts if isinstance(part, Text))
    return message.role == "assistant" and message.learn and any(text.strip() for text in said)


def _say(role: Any, words: str) -> Message:
    return Message(role, (Text(words),))
