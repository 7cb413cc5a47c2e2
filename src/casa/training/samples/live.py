"""Live captions as tokens: exactly what a StreamingSession feeds, with one window per frame.

    prompt  [frame 0]  suffix  words  stop  [frame 1]  suffix  stop  [frame 2]  suffix  words  stop
                               +++++  ++++                     ++++                     +++++  ++++   learned

A frame in silence is followed by its stop token alone, which is learned as well. Of a model without a delimiter behind
pictures, the token before the frame stands behind it, so that some text sees the frame before anything is said.
"""

from collections.abc import Sequence

from casa.data.bad import BadRecord
from casa.data.record import Message, Picture, Text
from casa.models import CasaProcessor
from casa.training.samples.chat import Stop, Tokens, answer_tokens


def is_live(messages: Sequence[Message]) -> bool:
    """Whether an assistant's words stand among frames with times."""
    return any(
        isinstance(part, Picture) and part.time is not None
        for message in messages
        if message.role == "assistant"
        for part in message.parts
    )


def live_tokens(messages: Sequence[Message], processor: CasaProcessor, stop: Stop) -> Tokens:
    """The first user's words are the prompt (the processor's own if there are none); later ones ask in mid-stream.

    Raises BadRecord for pictures outside of the assistant's turns, or if there is no frame; and for captions that are
    not to be learned, since all of them are.
    """
    feed = _Feed(processor, stop)
    asked: list[str] = []
    for message in messages:
        if message.role != "assistant":
            if any(isinstance(part, Picture) for part in message.parts):
                raise BadRecord("wrong-type", "A user shows pictures among live frames: make two records of it.")
            asked += [part.text for part in message.parts if isinstance(part, Text) and part.text.strip()]
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
    if not feed.pictures:
        raise BadRecord("wrong-type", "Live captions need frames with times.")
    return Tokens(tuple(feed.ids), tuple(feed.learn), tuple(feed.places), tuple(feed.pictures))


class _Feed:
    """The tokens so far. `open`: a frame or a question waits for its words; `asked`: that question."""

    def __init__(self, processor: CasaProcessor, stop: Stop) -> None:
        self._processor, self._stop = processor, stop
        self.ids: list[int] = []
        self.learn: list[bool] = []
        self.places: list[int] = []
        self.pictures: list[Picture] = []
        self._early: list[str] = []
        self._open, self._asked = False, ""

    def turn(self, asked: str) -> None:
        """The prompt, or a question in mid-stream; an assistant who goes on is not asked anything."""
        if self.ids and not asked:
            return
        chat = [{"role": "user", "content": [{"type": "text", "text": asked or self._processor.stream_prompt}]}]
        inputs = self._processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = inputs["input_ids"][0].tolist()
        if self.ids and tokens[0] == self._processor.tokenizer.bos_token_id:
            tokens = tokens[1:]
        self._add(tokens, False)
        # a prompt waits for its first frame, a question for its answer
        self._open = bool(self.pictures)
        self._asked = asked if self._open else ""

    def show(self, frame: Picture) -> None:
        before, after = self._processor.around_frame
        self._add(before, False)
        self.places.append(len(self.ids) if after else len(self.ids) - 1)
        self._add(after, False)
        self.pictures.append(frame)
        self._open, self._asked = True, ""

    def say(self, words: list[str]) -> None:
        """What is said of the frame at hand, and its stop token. Words before any frame are said of the first one."""
        if not self._open:
            self._early += words
            return
        said = " ".join(text.strip() for text in [*self._early, *words] if text.strip())
        if self._asked and said:
            tokens = answer_tokens(self._asked, said, self._processor, self._stop)
        else:
            tokens = list(self._processor.typed_text.encode_spelled(said).ids)
        self._add([*tokens, self._stop.token], True)
        self._early, self._open, self._asked = [], False, ""

    def _add(self, tokens: list[int], learned: bool) -> None:
        self.ids += tokens
        self.learn += [learned] * len(tokens)
