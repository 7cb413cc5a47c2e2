"""Conversations and live captions as tokens: what is learned, and where pictures stand.

A chat goes through the model's own template. What is learned begins where a model is asked:

    prompt     <user><image><frame>Read it.<end><assistant>          as rendered and encoded when it is asked
    whole      <user><image><frame>Read it.<end><assistant> «407»<end>
    learned                                                ++++++++  from the prompt's end to the stop, the blank too

« » mark answers while the template is rendered, and are taken out again. The prompt of the last answer has the very
tokens that the processor feeds; the rest of the whole follows. Answers of earlier turns stand in that prompt, and are
learned there from where their own prompts ended, up to the stop that the template wrote.

Live captions are exactly what a StreamingSession feeds, with one window per frame:

    prompt  [frame 0]  suffix  words  stop  [frame 1]  suffix  stop  [frame 2]  suffix  words  stop
                               +++++  ++++                     ++++                     +++++  ++++   learned

A frame in silence is followed by its stop token alone, which is learned as well. Of a model without a delimiter behind
pictures, the token before the frame stands behind it, so that some text sees the frame before anything is said.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2.exceptions import TemplateError

from casa.data.record import BadRecord, Message, Picture, Role, Text
from casa.errors import UserError
from casa.models import CasaProcessor
from casa.models.chat_template import TypedText, free_marks

Span = tuple[int, int]

# texts of which one joins no given text in a token; the last is none, for a tokenizer that joins them all
_AHEAD = ("\n", ":", "x", "0", "")


@dataclass
class ChatTokens:
    """ids, learn and places as in `TrainingSample`. pictures: those that the text needs, in order."""

    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def extend(self, ids: Sequence[int], learned: bool) -> None:
        """Adds tokens that are all learned, or all read."""
        self.ids += ids
        self.learn += [learned] * len(ids)

    def extend_template(
        self, ids: Sequence[int], offsets: Sequence[Span], learned: Sequence[Span], processor: CasaProcessor
    ) -> None:
        """Adds what a template wrote, with gist tokens for its image tokens.

        Args:
            offsets: Where each token stands in the text.
            learned: The spans of what is learned, in order and apart.
        """
        image, gist = processor.image_token_id, processor.gist_ids
        ends = [last for _, last in learned]
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token == image:
                self.places.append(len(self.ids))
                self.extend(gist, False)
            else:
                # the first span that ends behind the token's start
                span = bisect_right(ends, start)
                self.extend([token], span < len(learned) and end > learned[span][0])


@dataclass(frozen=True)
class AnswerStop:
    """How answers begin and end.

    Attributes:
        token: The id that a model gives at the end.
        text: What the template writes there, or None.
        lead: What the template writes between its generation prompt and an answer.
        notes: Sentences about what of its answers cannot be learned as it stands, and what is learned instead.
    """

    token: int
    text: str | None
    lead: str = ""
    notes: tuple[str, ...] = ()


def answer_stop(processor: CasaProcessor, given: int | None = None) -> AnswerStop:
    """Finds out by rendering.

    Args:
        given: The model's own stop token (`generation_config.eos_token_id`), where it is not the tokenizer's.

    Raises:
        UserError: There is none, or the tokenizer does not tell where its tokens stand.
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
        first, one = (_render(turns[:number], processor, number == 1) for number in (1, 2))
        second, two = (_render(turns[:number], processor, number == 3) for number in (3, 4))
        start, end = one.spans[-1]
    except (BadRecord, IndexError):
        # a template that refuses even this refuses every record, each with its own sentence
        return AnswerStop(int(token), None)
    behind = one.text[end:].lstrip()
    known = {*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}
    ends = sorted(filter(None, known), key=len, reverse=True)
    text = next((special for special in ends if behind.startswith(typed.spell(special))), None)
    lead = one.text[len(first.text) : start] if start is not None and one.text.startswith(first.text) else ""
    stop = AnswerStop(int(token), text, lead)
    return replace(stop, notes=tuple(_notes(typed, stop, (first, one), (second, two))))


def _notes(
    typed: TypedText, stop: AnswerStop, first: "tuple[_Rendered, _Rendered]", second: "tuple[_Rendered, _Rendered]"
) -> Iterator[str]:
    """first, second: a turn's prompt, and the same answered."""
    turns = [(prompt.text, whole.text) for prompt, whole in (first, second)]
    prompt, one = first
    if apart := [asked[_shared(asked, whole) :] for asked, whole in turns if not whole.startswith(asked)]:
        yield (
            f"the chat template's generation prompt ends with {typed.unspell(apart[0])!r}, which a finished chat has "
            "not: an answer's words and its stop are learned right behind that prompt"
        )
    elif not second[0].text.startswith(one.text[: _stopped(typed, one.text, one.spans[-1][1], stop)[0]]):
        yield (
            "the chat template writes answers of earlier turns otherwise than the last one: of those, their words and "
            "the stop are learned"
        )
    if stop.text is None:
        yield "the chat template writes no token that ends an answer: only the last answer of a chat learns to stop"
    if any(_behind(typed, prompt.text, stop.lead + word)[2] for word in ("48062", "yes", "Yes", "the", "a")):
        yield (
            "the tokenizer joins the end of the generation prompt with the beginning of an answer: the last answer of "
            "a chat is encoded by itself, behind the prompt; those of earlier turns begin within a token"
        )


def chat_tokens(messages: Sequence[Message], processor: CasaProcessor, stop: AnswerStop) -> ChatTokens:
    """Raises BadRecord if nothing is answered, or if text and pictures do not fit the template."""
    answers = [number for number, m in enumerate(messages) if m.role == "assistant" and m.learn and _words(m)]
    if not answers:
        raise BadRecord("empty-answer", "No assistant says anything: there is nothing to learn.")
    # what follows the last answer is read by nobody
    messages = messages[: answers[-1] + 1]
    prompt, rest = _cut(messages, processor, stop)
    typed = processor.typed_text
    encoding = typed.encode_spelled(prompt.text)
    found = ChatTokens()
    found.extend_template(encoding.ids, encoding.offsets, _earlier_answers(prompt, typed, stop), processor)
    ids, offsets, _ = _behind(typed, prompt.text, rest.text)
    found.extend_template(ids, offsets, rest.spans, processor)
    if not rest.closed:
        found.extend([stop.token], True)
    wanted = sum(text.count(typed.spelling(processor.image_token)) for text in (prompt.text, rest.text))
    if len(found.places) != wanted:
        raise BadRecord("broken-text", "The template's places for pictures are lost in its tokens.")
    pictures = [part for message in messages for part in message.parts if isinstance(part, Picture)]
    found.pictures = pictures[:wanted]
    return found


@dataclass(frozen=True)
class _Rendered:
    """A rendered chat, in `TypedText`'s spelling. spans: (start, end) of each piece of an answer in it; start is None
    if the template has cut it away.
    """

    text: str
    spans: list[tuple[int | None, int]]


@dataclass(frozen=True)
class _LastAnswer:
    """What follows the prompt of an answer. spans: what of it is learned. words: where its words end. closed: whether
    the template wrote a stop behind them.
    """

    text: str
    spans: list[Span]
    words: int
    closed: bool


def _render(messages: Sequence[Message], processor: CasaProcessor, prompt: bool) -> _Rendered:
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
    return _Rendered("".join(pieces), spans)


def _cut(messages: Sequence[Message], processor: CasaProcessor, stop: AnswerStop) -> tuple[_Rendered, _LastAnswer]:
    """A chat that ends with an answer, as the prompt of that answer and what follows, up to its stop.

    Raises BadRecord if the template loses the answer.
    """
    typed = processor.typed_text
    whole = _render(messages, processor, False)
    spans = whole.spans[-len(_words(messages[-1])) :]
    if not spans:
        raise BadRecord("broken-text", "The model's chat template leaves the last answer out.")
    start, words = spans[0][0], spans[-1][1]
    until, closed = _stopped(typed, whole.text, words, stop)
    # where nobody asks, the answer stands where the template puts it
    asked = len(messages) > 1
    prompt = _render(messages[:-1], processor, True) if asked else _Rendered(whole.text[: start or 0], [])
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
    return prompt, _LastAnswer(whole.text[border:until], learned, words - border, closed)


def _earlier_answers(prompt: _Rendered, typed: TypedText, stop: AnswerStop) -> list[Span]:
    """Where answers of earlier turns are learned in a prompt: with what leads to them, and their stops."""
    found: list[Span] = []
    for start, end in prompt.spans:
        if start is not None:
            lead = len(stop.lead) if prompt.text[:start].endswith(stop.lead) else 0
            found.append((start - lead, _stopped(typed, prompt.text, end, stop)[0]))
    return found


def _stopped(typed: TypedText, text: str, end: int, stop: AnswerStop) -> tuple[int, bool]:
    """Where the stop behind an answer's end ends; that end, and False, if the template wrote none."""
    behind = text[end:].lstrip()
    written = typed.spell(stop.text) if stop.text is not None else None
    if written is None or not behind.startswith(written):
        return end, False
    return len(text) - len(behind) + len(written), True


def _behind(typed: TypedText, before: str, text: str) -> tuple[list[int], list[Span], bool]:
    """Token ids of a text that follows another, with their places in it; and whether one of its tokens would begin
    before it, so that it had to be encoded without that other text.
    """
    first, length, ahead, encoding = 0, 0, before, typed.encode_spelled("")
    for ahead in (before, *_AHEAD):
        encoding, length = typed.encode_spelled(ahead + text), len(ahead)
        first = next((at for at, (start, _) in enumerate(encoding.offsets) if start >= length), len(encoding.ids))
        if all(end <= length for _, end in encoding.offsets[:first]):
            break
    offsets = [(start - length, end - length) for start, end in encoding.offsets[first:]]
    return list(encoding.ids[first:]), offsets, ahead is not before


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _words(message: Message) -> list[str]:
    """The texts of a message that hold words."""
    return [part.text for part in message.parts if isinstance(part, Text) and part.text.strip()]


def _say(role: Role, words: str) -> Message:
    return Message(role, (Text(words),))


def live_tokens(messages: Sequence[Message], processor: CasaProcessor, stop: AnswerStop) -> ChatTokens:
    """The first user's words are the prompt (the processor's own if there are none); later ones ask in mid-stream.

    Raises BadRecord for pictures outside of the assistant's turns, or if there is no frame; and for captions that are
    not to be learned, since all of them are.
    """
    feed = _LiveFeed(processor, stop)
    asked: list[str] = []
    for message in messages:
        if message.role != "assistant":
            if any(isinstance(part, Picture) for part in message.parts):
                raise BadRecord("wrong-type", "A user shows pictures among live frames: make two records of it.")
            asked += _words(message)
            continue
        if not message.learn:
            raise BadRecord("unfollowed-field", "Captions are all learned: leave those out that are not to be.")
        feed.turn("\n".join(asked))
        asked = []
        words: list[str] = []
        for part in message.parts:
            if isinstance(part, Text):
                words.append(part.text)
            else:
                feed.say(words)
                feed.show(part)
                words = []
        feed.say(words)
    if not feed.tokens.pictures:
        raise BadRecord("wrong-type", "Live captions need frames with times.")
    return feed.tokens


class _LiveFeed:
    """The tokens so far. `_open`: a frame or a question waits for its words; `_asked`: that question."""

    def __init__(self, processor: CasaProcessor, stop: AnswerStop) -> None:
        self._processor, self._stop = processor, stop
        self.tokens = ChatTokens()
        self._early: list[str] = []
        self._open, self._asked, self._prompt = False, "", ""

    def turn(self, asked: str) -> None:
        """The prompt, or a question in mid-stream; an assistant who goes on is not asked anything."""
        begun = bool(self.tokens.ids)
        if begun and not asked:
            return
        self._prompt = self._prompt if begun else asked or self._processor.stream_prompt
        self.tokens.extend(self._processor.turn(asked or self._prompt, opens=not begun)[0], False)
        # a prompt waits for its first frame, a question for its answer
        self._open = bool(self.tokens.pictures)
        self._asked = asked if self._open else ""

    def show(self, frame: Picture) -> None:
        """A frame, with what stands around it."""
        before, after = self._processor.around_frame(self._prompt)
        tokens = self.tokens
        tokens.extend(before, False)
        tokens.places.append(len(tokens.ids) if after else len(tokens.ids) - 1)
        tokens.extend(after, False)
        tokens.pictures.append(frame)
        self._open, self._asked = True, ""

    def say(self, words: list[str]) -> None:
        """What is said of the frame at hand, and its stop token. Words before any frame are said of the first one."""
        if not self._open:
            self._early += words
            return
        said = " ".join(text.strip() for text in [*self._early, *words] if text.strip())
        typed = self._processor.typed_text
        if self._asked and said:
            # behind the template's generation prompt, without the stop
            prompt, rest = _cut([_say("user", self._asked), _say("assistant", said)], self._processor, self._stop)
            ids = _behind(typed, prompt.text, rest.text[: rest.words])[0]
        else:
            ids = list(typed.encode_spelled(said).ids)
        self.tokens.extend([*ids, self._stop.token], True)
        self._early, self._open, self._asked = [], False, ""
