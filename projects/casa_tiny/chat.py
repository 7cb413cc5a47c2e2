"""The tokenizer of casa-tiny, and questions and streams as rows of its tokens.

Any text can be encoded (every byte is a token), and every digit is a token of its own: a number is then said digit by
digit, which is how it is read off a page.

    text    <user><image><frame>Read line 2.<end><assistant>4071<end>
    ids     <user> <frame> Read Ġline Ġ 2 . <end> <assistant> 4 0 7 1 <end>
    learn                                                     + + + + +
    place          ^ the picture stands before <frame>

<image> marks where a picture stands and never reaches the model. <frame> is the delimiter behind a picture: the token
that looks at it, stays in the text, and so carries what was seen. In a stream every frame is `<image><frame>`, what is
new on it, and `<end>`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from casa.errors import UserError

PAD, USER, ASSISTANT, END, IMAGE, FRAME = "<pad>", "<user>", "<assistant>", "<end>", "<image>", "<frame>"
SPECIAL = (PAD, USER, ASSISTANT, END, IMAGE, FRAME)
IGNORED = -100  # the label of a token that is not learned

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<user>' if message['role'] == 'user' else '<assistant>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image><frame>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<end>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens with merges learned from `texts`; same texts, same tokenizer.

    Raises:
        UserError: The vocabulary is too small for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL)
    if vocabulary < least:
        raise UserError(f"a vocabulary of {vocabulary} is too small; bytes and special tokens need {least}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,  # type: ignore[call-arg]
        special_tokens=list(SPECIAL),  # type: ignore[call-arg]
        initial_alphabet=sorted(alphabet),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, IMAGE, FRAME],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


@dataclass(frozen=True)
class ChatTokens:
    """ids: tokens. learn: which of them the loss counts. places: per picture, the index before which it stands."""

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    places: tuple[int, ...] = ()

    def as_text(self) -> "ChatTokens":
        """The same tokens for a text-only model, which learns all of them."""
        return replace(self, learn=(True,) * len(self.ids), places=())


class Writer:
    """Writes questions and streams as tokens. Equal pieces of text are encoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def dialogue(self, turns: Iterable[tuple[str, str]]) -> ChatTokens:
        """Questions about one picture, one after the other, with their answers."""
        parts: list[tuple[str, bool]] = []
        for number, (question, answer) in enumerate(turns):
            before = USER + FRAME if number == 0 else USER
            parts += [(before + question + END + ASSISTANT, False), (answer + END, True)]
        return self._join(parts, (1,) if parts else ())

    def clip(self, prompt: str, captions: Sequence[str]) -> ChatTokens:
        """A stream: a picture per caption, "" being silence, which is learned as well."""
        parts: list[tuple[str, bool]] = [(USER + prompt + END + ASSISTANT, False)]
        places, length = [], len(self._encode(parts[0][0]))
        for caption in captions:
            places.append(length)
            parts += [(FRAME, False), (caption + END, True)]
            length += 1 + len(self._encode(caption + END))
        return self._join(parts, tuple(places))

    def _encode(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[text] = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return self._known[text]

    def _join(self, parts: Sequence[tuple[str, bool]], places: tuple[int, ...]) -> ChatTokens:
        pieces = [(self._encode(text), learned) for text, learned in parts]
        ids = tuple(token for piece, _ in pieces for token in piece)
        return ChatTokens(ids, tuple(learned for piece, learned in pieces for _ in piece), places)


class PackedRows(NamedTuple):
    """Samples in rows; pictures: (sample, picture of that sample) in the order of `image_positions` (n, 2).

        row        a a a a a b b b . .      two samples, then padding
        positions  0 1 2 3 4 0 1 2 0 1      restart with every sample
        labels     - - - a a - b b - -      answers only; the first token of a sample is never one

    The tensors are int64: input_ids, position_ids, labels (B, T); image_positions: row, index in the row.
    """

    inputs: dict[str, Tensor]
    image_positions: Tensor
    pictures: list[tuple[int, int]]


def pack(samples: Sequence[ChatTokens], row_tokens: int, pad: int) -> PackedRows:
    """Samples, longest first, each into the first row with room; rows have the length of the fullest.

    Raises:
        ValueError: A sample is empty, or longer than `row_tokens`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: (-len(samples[i].ids), i)):
        length = len(samples[index].ids)
        if not 0 < length <= row_tokens:
            raise ValueError(f"a sample has {length} tokens; a row holds 1 to {row_tokens}.")
        row = next((number for number, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= length
    width = row_tokens - min(room, default=row_tokens)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), IGNORED)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    places: list[tuple[int, int]] = []
    pictures: list[tuple[int, int]] = []
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            sample = samples[index]
            stop = start + len(sample.ids)
            ids[row, start:stop] = own = torch.tensor(sample.ids)
            learn = torch.tensor(sample.learn)
            learn[0] = False
            positions[row, start:stop] = torch.arange(len(own))
            labels[row, start:stop] = torch.where(learn, own, IGNORED)
            places += [(row, start + place) for place in sample.places]
            pictures += [(index, number) for number in range(len(sample.places))]
            start = stop
        positions[row, start:] = torch.arange(width - start)
    inputs = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return PackedRows(inputs, torch.tensor(places, dtype=torch.int64).view(-1, 2), pictures)
