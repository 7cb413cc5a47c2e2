"""Pages that are never drawn: image tokens of which each says without fault which words begin in it.

That is what the page encoder is trained to give. So layers can learn to find and to say texts for the text model's own
arithmetic alone.

Shapes: B samples, L text tokens of a row, N image tokens of all pages.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from casa.vision.page_encoder import CELL, PageEncoder, place_waves
from casa.vision.page_reading import TextRun
from casa.vision.page_words import BEFORE, TAG_IDS, Encode, known_words, words_of_page
from projects.casa_smol.tasks.asked import ordinal, turn
from projects.casa_smol.tasks.films import PROMPT as PROMPT_OF_FILMS
from projects.casa_smol.tasks.lines import READ, READ_AFTER, READ_BEFORE, READ_LAST, READ_NUMBERED
from projects.casa_smol.words import Words, pick

TOKEN = 16  # px, height and width of an image token
BLOCK = TOKEN // CELL[0], TOKEN // CELL[1]  # cells of an image token
IMAGE_AT = 3  # pictures stand before this token of a prompt
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
VALUE = (
    "What is the {key}?", "{key}?", "Tell me the {key}.", "What does it say for {key}?", "How much is the {key}?",
    "Which {key} is given?", "How much was paid for the {key}?", "What is the price of {key}?", 'What is in "{key}"?',
)  # fmt: skip
CELL_OF = (
    "What is the {column} of {key}?", "Which {column} does {key} have?", "{column} of {key}?",
    "What does the table give as {column} for {key}?", "How much is the {column} for {key}?",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A page and a question.

    ids: int (rows, columns, ids of an image token), what is written there. prompt, answer: token ids. image_at: the
    prompt's token before which the picture stands. begins: number of the image token in which the answer begins, -1 if
    nobody knows. asked: places in the prompt of tokens that say what is asked for, as far as is known. earlier: what
    was asked before, in order; a question about the same `ids` shows no second picture.
    """

    ids: np.ndarray
    prompt: list[int]
    answer: list[int]
    image_at: int = IMAGE_AT
    begins: int = -1
    asked: tuple[int, ...] = ()
    earlier: tuple["Sample", ...] = ()

    @property
    def turns(self) -> tuple["Sample", ...]:
        """All questions, this one last."""
        return (*self.earlier, self)

    @property
    def length(self) -> int:
        """Of all its text."""
        return sum(len(one.prompt) + len(one.answer) for one in self.turns)


@dataclass(frozen=True)
class Batch:
    """inputs: of a model. labels: (B, L), -100 where nothing is to be said.

    begins: int64 (F, 4), of answers whose place is known: row and column of the token before it, the image token of all
    in which it begins, and the column behind its picture. asked: int64 (A, 4), of tokens that say what is asked for:
    row and column of the token before the answer, its own column, and that behind the picture.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    begins: Tensor
    asked: Tensor


def after(sample: Sample, earlier: Sample, line_break: int) -> Sample:
    """A sample as the next turn of a chat, behind another's turns. line_break: id of the token between turns."""
    prompt, asked = [line_break, *sample.prompt], tuple(at + 1 for at in sample.asked)
    return replace(sample, prompt=prompt, image_at=sample.image_at + 1, asked=asked, earlier=earlier.turns)


def encoding(tokenizer: Any) -> Encode:
    """A text to the ids of its tokens, each with where in the text it begins and ends."""

    def encode(text: str) -> list[tuple[int, tuple[int, int]]]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    return encode


class Pages:
    """Draws samples: one line, lines one below the other, names with their values beside or below them, or a table."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encode, self._known = encoding(tokenizer), known_words(tokenizer.get_vocab())
        self.words = Words("train")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.line_break = self._encode("\n")[0][0]

    def _text(self, rng: Generator, most: int) -> str:
        count = int(rng.integers(1, most + 1))
        text = " ".join(self.words.styled(rng) if rng.random() < 0.85 else self.words.piece(rng) for _ in range(count))
        return text[:1].upper() + text[1:] if rng.random() < 0.4 else text

    def sample(self, rng: Generator, pages: float) -> Sample:
        """One line, or with that probability a page of some kind."""
        if rng.random() >= pages:
            return self._asked(rng, [(self._text(rng, 6), 0, 0.0)], int(rng.integers(14, 40)), READ, 0, {})
        return pick(rng, (self._lines, self._lines, self._fields, self._table))(rng)

    def _lines(self, rng: Generator) -> Sample:
        """Up to twenty lines, of which one is asked for."""
        texts = list(dict.fromkeys(self._text(rng, 5) for _ in range(int(rng.integers(2, 21)))))
        placed = [(text, row, 0.0) for row, text in enumerate(texts)]
        row = int(rng.integers(len(texts)))
        kinds = [(READ_NUMBERED, row)] * 3 + [(READ_LAST, len(texts) - 1)]
        kinds += [(READ_AFTER, row + 1)] * 2 if row + 1 < len(texts) else []
        kinds += [(READ_BEFORE, row - 1)] * 2 if row else []
        wordings, answer = pick(rng, kinds)
        names = {"n": row + 1, "nth": ordinal(row + 1), "line": texts[row]}
        return self._asked(rng, placed, int(rng.integers(12, 22)), wordings, answer, names)

    def film(self, rng: Generator) -> Sample:
        """Frames of a session in which lines come one by one, or replace each other: of each the last line is asked."""
        step, count = bool(rng.random() < 0.7), int(rng.integers(1, 4))
        texts = [self._text(rng, 4) for _ in range(int(rng.integers(count, 9)))]
        at, layout, frames = int(rng.integers(len(texts) - count + 1)), int(rng.integers(2**31)), list[Sample]()
        for number in range(count):
            shown = np.random.default_rng(layout)  # lines stay where they are
            opening = self._turn(PROMPT_OF_FILMS) if number == 0 else []
            told: dict[str, Any] = {"prompt": [*opening, *self._turn(PROMPT_OF_FILMS)]}
            told["image_at"] = len(opening) + IMAGE_AT
            if rng.random() < 0.12:  # nothing is written, and nothing said
                rows, columns = map(int, rng.integers(4, 24, 2))
                ids = words_of_page([], (rows, columns), BLOCK, self._encode, self.end).ids
                frames.append(Sample(ids, answer=[self.end], **told))
                continue
            lines = texts[: at + 1] if step else texts[at : at + 1]
            placed = [(text, row, 0.0) for row, text in enumerate(lines)]
            size = int(shown.integers(14, 28))
            frames.append(replace(self._asked(shown, placed, size, (PROMPT_OF_FILMS,), len(lines) - 1, {}), **told))
            at = min(at + int(rng.random() < 0.7), len(texts) - 1)
        return replace(frames[-1], earlier=tuple(frames[:-1]))

    def _turn(self, question: str) -> list[int]:
        return [token for token, _ in self._encode(PROMPT.format(question=question))]

    def _fields(self, rng: Generator) -> Sample:
        """Names, and what belongs to them."""
        size = int(rng.integers(12, 22))
        keys = list(dict.fromkeys(self.words.phrase(rng, 1, 3) for _ in range(int(rng.integers(2, 15)))))
        values = [self._value(rng) for _ in keys]
        colon = ":" if rng.random() < 0.4 else ""
        below = rng.random() < 0.25
        right = 0.0 if below else max(map(len, keys)) * size * 0.5 + rng.uniform(8, 120)
        step = 2 if below else 1
        placed = [(key + colon, step * row, 0.0) for row, key in enumerate(keys)]
        placed += [(value, step * row + below, right) for row, value in enumerate(values)]
        row = int(rng.integers(len(keys)))
        return self._asked(rng, placed, size, VALUE, len(keys) + row, {"key": self._named(rng, keys[row])})

    def _table(self, rng: Generator) -> Sample:
        """Rows and columns with names, and what stands where they meet."""
        size = int(rng.integers(12, 18))
        columns = list(dict.fromkeys(self.words.phrase(rng, 1, 2) for _ in range(int(rng.integers(3, 6)))))
        keys = list(dict.fromkeys(self.words.phrase(rng, 1, 2) for _ in range(int(rng.integers(2, 11)))))
        rows = [columns, *([key, *(self._value(rng) for _ in columns[1:])] for key in keys)]
        rights = np.cumsum(
            [0, *(max(map(len, texts)) * size * 0.6 + rng.uniform(8, 40) for texts in zip(*rows, strict=True))]
        )
        placed = [(text, at, rights[place]) for at, row in enumerate(rows) for place, text in enumerate(row)]
        row, column = int(rng.integers(len(keys))), int(rng.integers(1, max(2, len(columns))))
        if column >= len(columns):  # all columns had one name
            return self._lines(rng)
        names = {"key": self._named(rng, keys[row]), "column": self._named(rng, columns[column])}
        return self._asked(rng, placed, size, CELL_OF, (row + 1) * len(columns) + column, names)

    def _value(self, rng: Generator) -> str:
        return self.words.piece(rng) if rng.random() < 0.7 else self.words.phrase(rng, 1, 3)

    def _named(self, rng: Generator, name: str) -> str:
        return name if rng.random() < 0.4 else name.lower()

    def _asked(
        self, rng: Generator, placed: list[tuple[str, int, float]], size: int, wordings: Any, answer: int, names: Any
    ) -> Sample:
        wide, step = size * rng.uniform(0.45, 0.6), size * rng.uniform(1.3, 2.0)
        left, top = rng.uniform(2, 30), rng.uniform(0, 14)
        columns = int((left + max(x + len(text) * wide for text, _, x in placed)) // TOKEN) + 1
        rows = int((top + (max(row for _, row, _ in placed) + 1) * step) // TOKEN) + 1
        runs = [
            TextRun(
                text,
                np.full(len(text), (top + (row + 0.5) * step) / CELL[0] - 0.5),
                (left + x + (np.arange(len(text)) + 0.5) * wide) / CELL[1] - 0.5,
            )
            for text, row, x in placed
        ]
        page = words_of_page(runs, (rows, columns), BLOCK, self._encode, self.end, self._known)
        question = turn(rng, wordings, placed[answer][0], **names)
        said = [token for token, _ in self._encode(question.answer)]
        text = PROMPT.format(question=question.question)
        prompt, spans = self._encode(text), [span for name in names.values() for span in _spans(text, str(name))]
        asked = [at for at, (_, (a, b)) in enumerate(prompt) if any(a < stop and b > start for start, stop in spans)]
        ids = [token for token, _ in prompt]
        return Sample(page.ids, ids, [*said, self.end], begins=page.spots[answer][0][0], asked=tuple(asked))

    def sentences(self, rng: Generator, tokens: int, rows: int = 8, length: int = 64) -> Iterator[Tensor]:
        """int64 (rows, length): questions with answers, and any words behind them, about so many tokens in all."""
        said = [self.tokenizer.decode([number]) for number in range(len(self.tokenizer))]
        plain = [number for number, text in enumerate(said) if text.strip() and text.isascii() and text.isprintable()]
        for _ in range(-(-tokens // (rows * length))):
            drawn = [self.sample(rng, 0.75) for _ in range(rows)]
            ids = [[*one.prompt, *one.answer, *rng.choice(plain, length).tolist()][:length] for one in drawn]
            yield torch.tensor(ids)


def _spans(text: str, name: str) -> list[tuple[int, int]]:
    """Where a name stands in a text, as a word."""
    return [found.span() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def batch_of(
    samples: list[Sample], encoder: PageEncoder, rng: Generator, noise: float = 0.1, empty: float = 0.1
) -> Batch:
    """What a model sees and is to say, padded at the left; pictures stand before the question's first word.

    Args:
        samples: Pages with questions and answers.
        encoder: Knows codes of words.
        rng: Draws what follows.
        noise: Of an image token's codes, in lengths of one.
        empty: How many of the image tokens stay in which nothing begins; where they are does not matter.
    """
    length = max(one.length for one in samples)
    ids, labels = torch.zeros(len(samples), length, dtype=torch.long), torch.full((len(samples), length), -100)
    mask = torch.zeros_like(ids)
    positions, grids, tokens, begins, asked = [], [], [], [], []
    for row, sample in enumerate(samples):
        start, page, place = length - sample.length, None, torch.zeros(0)
        mask[row, start:] = 1
        for one in sample.turns:
            first = start + len(one.prompt)
            stop = first + len(one.answer)
            ids[row, start:stop] = torch.tensor(one.prompt + one.answer)
            labels[row, first:stop] = torch.tensor(one.answer)
            if one.ids is not page:
                page = one.ids
                every = torch.from_numpy(page).flatten(0, 1)
                stays = (every[:, TAG_IDS + BEFORE] >= 0) | torch.from_numpy(rng.random(len(every)) < empty)
                stays[0] = True  # a picture has at least one image token
                written = every[stays]
                words = encoder.codes_of(written, torch.float32)
                off = noise / max(encoder.config.word_sizes) ** 0.5
                words = words + torch.from_numpy(rng.standard_normal(words.shape)).float() * off
                places = place_waves(page.shape[0], page.shape[1], encoder.config.token_size)[stays]
                tokens.append(torch.cat([words, places], dim=1))
                positions.append((row, start + one.image_at))
                grids.append((1, 1, len(written)))
                # the number of each image token among those that stay, of all pictures
                place = sum(grid[-1] for grid in grids[:-1]) + stays.cumsum(0) - 1
            if one.begins >= 0:
                begins.append((row, first - 1, int(place[one.begins]), positions[-1][1]))
            asked += [(row, first - 1, start + at, positions[-1][1]) for at in one.asked]
            start = stop
    inputs = {
        "input_ids": ids, "attention_mask": mask, "image_positions": torch.tensor(positions),
        "image_grid_thw": torch.tensor(grids), "image_features": torch.cat(tokens),
    }  # fmt: skip
    known = (torch.tensor(rows, dtype=torch.long).view(-1, 4) for rows in (begins, asked))
    return Batch(inputs, labels, *known)
