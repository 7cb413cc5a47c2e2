"""Questions and streams as token rows: what is said, where pictures stand, and which tokens are to be learned.

    ids     <user> <frame> Read Ġline Ġ 2 . <end> <assistant> 4 0 7 1 <end>
    learn                                                     + + + + +
    place          ^ the picture stands before <frame>

It writes what the chat template and a streaming session feed; a test holds them equal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from casa.training.tokenizer import ASSISTANT, END, FRAME, USER


@dataclass(frozen=True)
class Sample:
    """ids: tokens. learn: which of them the loss counts. places: per picture, the index before which it stands."""

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Writer:
    """Writes samples with one tokenizer. Equal pieces of text are encoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[text] = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return self._known[text]

    def dialogue(self, turns: Iterable[tuple[str, str]]) -> Sample:
        """Questions about one picture, one after the other, with their answers."""
        parts: list[tuple[str, bool]] = []
        for number, (question, answer) in enumerate(turns):
            before = USER + FRAME if number == 0 else USER
            parts += [(before + question + END + ASSISTANT, False), (answer + END, True)]
        ids, learn = self._join(parts)
        return Sample(ids, learn, (1,) if ids else ())

    def clip(self, prompt: str, captions: Sequence[str]) -> Sample:
        """A stream: a picture per caption, "" being silence, which is learned as well."""
        parts: list[tuple[str, bool]] = [(USER + prompt + END + ASSISTANT, False)]
        places, length = [], len(self.encode(parts[0][0]))
        for caption in captions:
            places.append(length)
            parts += [(FRAME, False), (caption + END, True)]
            length += 1 + len(self.encode(caption + END))
        ids, learn = self._join(parts)
        return Sample(ids, learn, tuple(places))

    def _join(self, parts: Sequence[tuple[str, bool]]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        pieces = [(self.encode(text), learned) for text, learned in parts]
        ids = tuple(token for piece, _ in pieces for token in piece)
        return ids, tuple(learned for piece, learned in pieces for _ in piece)


def without_pictures(sample: Sample) -> Sample:
    """The same text for a text-only model, which learns all of it."""
    return Sample(sample.ids, (True,) * len(sample.ids))
