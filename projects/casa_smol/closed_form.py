"""What a layer's queries and keys begin with: a guess of codes and places from hidden states, by least squares.

Begun from nothing, layers learn their samples by heart, or look at the right token with little of their attention. From
here `finding.py` teaches them.

Shapes: D width (576), C of a head (64); three query heads ask each of the three key heads (G).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casa.vision.page_words import BEFORE, TAGS
from projects.casa_smol.finding import ASKED_HEAD, Kept
from projects.casa_smol.perfect_pages import Sample
from projects.casa_smol.start import (
    ASKED,
    CARRIED,
    DISTANCE,
    PLACED,
    PLACES,
    SINK,
    STILL,
    Start,
    heads_of,
    least_squares,
    turned,
)

CALLED, PLACED_BY, UNDER = range(len(TAGS))
ASKING = (
    ((0, 44), {CALLED: 1.0, PLACED_BY: 0.3}, -1.0),
    ((16, 60), {CALLED: 1.0, PLACED_BY: 0.3}, -1.0),
    ((0, 24), {UNDER: 1.0}, 1.0),
)
"""By key head: which numbers of the code of what is asked for it compares, and with which tags, each with its weight.
They are added up before they are compared: a head that went by a row's name alone would look at all its cells. Last:
whether it looks where something is asked for by what is below it (1), where by anything else (-1), or at both (0)."""
AGAIN = (
    ((0, 28), {CALLED: 1.0, PLACED_BY: 0.3, UNDER: 0.2}, 0.0),
    ((28, 56), {CALLED: 1.0, PLACED_BY: 0.3}, 0.0),
    ((56, 84), {CALLED: 1.0}, 0.0),
)
"""The same for a layer that goes by places, too."""
SHARP = (0.6, 1.0, 1.6)  # of a key head's three query heads
WAVES_NEAR = [5 * part + octave for part in range(4) for octave in range(4)]
"""Which of the waves handed on are compared: up to 512 px."""
NEAR = slice(16, 32)  # of the numbers that turn little: there places are compared, by who looks for a place
FAR = torch.cat([STILL[: NEAR.start], STILL[NEAR.stop :]])
BEGINS = 63  # of the slowest pair: there is told whether a text begins
LAST = (22, 12, 10)  # numbers of codes that a head compares: of the last word and of the two before it


@dataclass(frozen=True)
class Closed:
    """Queries and keys in closed form, by a guess of codes from hidden states.

    Attributes:
        start: What is known of the model.
        line_break: Id of the token that stands before a text.
        asked, placed, begins, side, next, last: Nats that a comparison is worth where all is right: of tags, of places,
            of where texts begin, of the side that is asked by, of the next word; and of the last one, the one before it
            and the one before that.
        sink: Nats that "nothing here" scores.
    """

    start: Start
    line_break: int
    asked: float = 25.0
    placed: float = 10.0
    begins: float = 8.0
    side: float = 8.0
    next: float = 14.0
    last: tuple[float, float, float] = (25.0, 12.0, 8.0)
    sink: float = 6.0

    @torch.no_grad()
    def first(self, layer: Any, block: int, kept: Sequence[Kept], again: bool) -> None:
        """Sets a layer that finds a text by its tags; again, half of its numbers are for places that were handed on."""
        known = [(one, asked) for one in kept if (asked := self._asked_for(one.sample)) is not None]
        states = torch.stack([one.states[block][len(one.sample.prompt) - 1].float() for one, _ in known])
        told = self._guessed(states, torch.stack([asked for _, asked in known]))
        below = self._guessed(states, torch.tensor([[self._below(one.sample)] for one, _ in known]))[0]
        queries, keys, constant = self._silent(layer, block)
        before = len(TAGS) + BEFORE - 1
        line_break = self.start.codes[self.line_break, : self.start.known(before)] * self.start.codes.shape[1] ** 0.5
        begins = line_break @ self._read(block, before, len(line_break)) / line_break.square().sum()
        near = self._placed(block, kept) * layer.head_dim**0.5 * self.placed if again else None
        for head, ((first, stop), tags, by_below) in enumerate(AGAIN if again else ASKING):
            still = FAR if again else STILL
            for slot, weight in tags.items():
                count = min(stop, self.start.known(slot)) - first
                keys[head][still[:count]] += self._read(block, slot, stop)[first:] * weight
            keys[head][BEGINS] = begins
            if again:
                keys[head][STILL[NEAR]] = self.start.places(block)[WAVES_NEAR]
            for query, sharp in zip(queries[head], SHARP, strict=True):
                query.zero_()
                query[still[: stop - first]] = self._compared(told[first:stop], layer, self.asked * sharp)
                query[BEGINS] = (constant * self.begins + below * self.side * by_below) * layer.head_dim**0.5
                if near is not None:
                    query[STILL[NEAR]] = near * sharp
                self._look_back(query, layer, constant)

    @torch.no_grad()
    def next_word(self, layer: Any, block: int, kept: Sequence[Kept]) -> None:
        """Sets a layer that finds the word which layers below have found."""
        said = [(one, len(one.sample.prompt) - 1, one.sample.answer) for one in kept]
        states = torch.cat([one.states[block][at : at + len(answer)].float() for one, at, answer in said])
        words = torch.tensor([token for *_, answer in said for token in answer])
        told = self._guessed(states, self.start.codes[words][:, :CARRIED])
        queries, keys, constant = self._silent(layer, block)
        for head in range(len(keys)):
            keys[head][FAR] = self._read(block, len(TAGS) + BEFORE + head, len(FAR))
            keys[head][STILL[NEAR]] = self.start.places(block)[WAVES_NEAR]
            near = self._placed(block, kept, head) * layer.head_dim**0.5 * self.placed
            for query in queries[head]:
                query.zero_()
                query[FAR] = self._compared(told[: len(FAR)], layer, self.next)
                query[STILL[NEAR]] = near
                self._look_back(query, layer, constant)

    @torch.no_grad()
    def later(self, layer: Any, block: int, kept: Sequence[Kept]) -> None:
        """Sets a layer that finds a word by the three before it: an answer's first one has none."""
        states: list[Tensor] = []
        said: list[list[Tensor]] = [[] for _ in LAST]
        for one in kept:
            begin, words = len(one.sample.prompt) - 1, torch.tensor([self.line_break, *one.sample.answer[:-1]])
            states.append(one.states[block][begin : begin + len(words)].float())
            codes = self.start.codes[words]
            for back, before in enumerate(said):
                before.append(nn.functional.pad(codes[: max(0, len(codes) - back)], (0, 0, min(back, len(codes)), 0)))
                before[-1][0] = 0
        queries, keys, constant = self._silent(layer, block)
        told = [
            self._guessed(torch.cat(states), torch.cat(codes)[:, :count])
            for codes, count in zip(said, LAST, strict=True)
        ]
        for head in range(len(keys)):
            own = len(TAGS) + BEFORE + head
            for back, some in enumerate(STILL.split(LAST), 1):
                keys[head][some] = self._read(block, own - back, len(some))
            for query, sharp in zip(queries[head], SHARP, strict=True):
                query.zero_()
                for some, guess, nats in zip(STILL.split(LAST), told, self.last, strict=True):
                    query[some] = self._compared(guess, layer, nats * sharp)
                self._look_back(query, layer, constant)

    def _placed(self, block: int, kept: Sequence[Kept], slot: int | None = None) -> Tensor:
        """(waves, D): from a hidden state to the place of the word to come, by least squares.

        Of an answer's first word; with a slot, of all words that are that one of an image token.
        """
        axes = self.start.slots.axes[self.start.slots.places][PLACES][WAVES_NEAR] / PLACED
        known = [
            (one.states[block][len(one.sample.prompt) - 1 + number], one.image[token])
            for one in kept
            for number, token, place in one.found
            if (number == 0 if slot is None else place == slot)
        ]
        states, images = (torch.stack(parts).float() for parts in zip(*known, strict=True))
        return self._guessed(states, images @ axes.T) / (len(WAVES_NEAR) / 2)

    def _asked_for(self, sample: Sample) -> Tensor | None:
        wanted = self.start.names[torch.tensor(sample.prompt)[torch.tensor(sample.wanted)]]
        return self.start.codes[wanted][:, :ASKED].mean(0) if len(wanted) else None

    def _below(self, sample: Sample) -> float:
        """1 where a text is asked for by more of what is below it than of any other tags, else -1."""
        if (at := sample.found[0][0]) < 0:
            return -1.0
        wanted = set(self.start.names[torch.tensor(sample.prompt)[torch.tensor(sample.wanted)]].tolist())
        tags = sample.ids.reshape(-1, sample.ids.shape[-1])[at]
        kinds = np.split(tags, np.cumsum([sum(groups) for groups in TAGS]))[: len(TAGS)]
        called, placed, under = (len(wanted & set(kind.tolist())) for kind in kinds)
        return 1.0 if under > max(called, placed) else -1.0

    def _guessed(self, states: Tensor, wanted: Tensor) -> Tensor:
        """(numbers, D): least squares."""
        return least_squares(states.T @ states / len(states), states.T @ wanted / len(states), 0.02).T

    def _read(self, block: int, slot: int, count: int) -> Tensor:
        """(count, D): from an image token behind the norm to the first numbers of a slot, of variance 1."""
        return self.start.slots.read(slot, slice(count)) / self.start.gains[block] * self.start.length

    def _compared(self, guess: Tensor, layer: Any, nats: float) -> Tensor:
        """Queries whose product with keys of the same numbers is so large where all are right."""
        return guess * (layer.head_dim * self.start.codes.shape[1]) ** 0.5 * nats / len(guess)

    def _look_back(self, query: Tensor, layer: Any, constant: Tensor) -> None:
        """Turns a query (C, D) for a picture some tokens before, and lets it look at "nothing here" too."""
        query.copy_(turned(query.T, torch.tensor(-DISTANCE)).T)
        query[SINK] = constant * self._sink(layer)

    def _sink(self, layer: Any) -> float:
        return (layer.head_dim**0.5 * self.sink) ** 0.5

    def _silent(self, layer: Any, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (G, 3, C, D) that look at "nothing here", keys (G, C, D) of which text is that; (D,) to 1."""
        queries, keys, *_ = heads_of(layer)
        queries.zero_()
        keys.zero_()
        constant = self.start.constants[block]
        keys[:, SINK] = constant * self._sink(layer)
        queries[:, SINK] = 8 * constant * self._sink(layer)
        return queries.unflatten(0, (len(keys), -1)), keys, constant


def begin_asking(layer: Any, block: int, role: str, kept: Sequence[Kept], closed: Closed) -> None:
    """Sets what a layer's queries and keys learn from."""
    torch.manual_seed(block)
    queries, keys, *_ = heads_of(layer)
    if role in ("first", "again"):
        closed.first(layer, block, kept, role == "again")
    elif role == "next":
        closed.next_word(layer, block, kept)
    elif role == "later":
        closed.later(layer, block, kept)
    with torch.no_grad():
        if role == "asked":  # beside what keeps it from looking at pictures
            group = len(queries) // len(keys)
            for rows in (queries[ASKED_HEAD * group], keys[ASKED_HEAD]):
                rows += 0.02 * torch.randn_like(rows)


def share_asked(layer: Any) -> None:
    """The third key head carries further numbers of what the second one looks at."""
    queries, keys, *_ = heads_of(layer)
    group = len(queries) // len(keys)
    with torch.no_grad():
        for rows, step in ((queries, group), (keys, 1)):
            rows[(ASKED_HEAD + 1) * step] = rows[ASKED_HEAD * step]
