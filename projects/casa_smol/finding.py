"""Where to look: queries and keys of the fusion layers, learned one layer after the other on hidden states kept once.

Hidden states of a frozen model change only with what layers below them say. So the text model runs once over some
thousand questions, and queries and keys of a layer learn on what is kept, for a hundredth of what a step through the
whole model costs. Layers have one of five roles:

- "asked", the first one: which words of a question say what is asked for. Their codes are handed on.
- "first": with which text an answer begins: whose tags have most in common with what is asked for.
- "again": the same, by the places too where the first layer's heads have looked: one for a row, another for a column.
- "later": which word comes next, by the last three.
- "next": the word that layers below have found, by its code and its place.

Those of the last stage say the word aloud (`start.STAGES`); all others but the first hand on, for layers that follow,
its code and where each of their heads looks.

All but the first begin in closed form, with a guess of codes and places by least squares: begun from nothing they learn
their samples by heart, or look at the right token with a small part of their attention.

Shapes: B samples, L text tokens, M image tokens, K answer tokens, D width (576), C of a head (64). Three query heads
ask each of the three key heads (G), which know the first, second and third word that begins in an image token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casa.vision.page_encoder import PageEncoder
from casa.vision.page_words import BEFORE, TAGS
from projects.casa_smol.perfect_pages import IMAGE_AT, Sample, batch_of
from projects.casa_smol.start import (
    ASKED,
    CARRIED,
    DISTANCE,
    PLACED,
    PLACES,
    SINK,
    STILL,
    Slots,
    Start,
    heads_of,
    least_squares,
    turned,
)

CALLED, PLACED_BY, UNDER = range(len(TAGS))
ASKING = (
    ((0, 44), {CALLED: 1.0, PLACED_BY: 0.3, UNDER: 0.2}),
    ((16, 60), {CALLED: 1.0, PLACED_BY: 0.3}),
    ((40, 84), {CALLED: 1.0}),
)
"""By key head: which numbers of the code of what is asked for it compares, and with which tags, each with its weight.
They are added up before they are compared: a head that went by a row's name alone would look at all its cells."""
AGAIN = (
    ((0, 28), {CALLED: 1.0, PLACED_BY: 0.3, UNDER: 0.2}),
    ((28, 56), {CALLED: 1.0, PLACED_BY: 0.3}),
    ((56, 84), {CALLED: 1.0}),
)
"""The same for a layer that goes by places, too."""
SHARP = (0.6, 1.0, 1.6)  # of a key head's three query heads
WAVES_NEAR = [5 * part + octave for part in range(4) for octave in range(4)]
"""Which of the waves handed on are compared: up to 512 px."""
NEAR = slice(16, 32)  # of the numbers that turn little: there places are compared, by who looks for a place
FAR = torch.cat([STILL[: NEAR.start], STILL[NEAR.stop :]])
BEGINS = 63  # of the slowest pair: there is told whether a text begins
ASKED_HEAD = 1  # key head of the first layer that hands on what is asked for
LAST = (22, 12, 10)  # numbers of codes that a head compares: of the last word and of the two before it
ANSWERED = 12  # words of an answer that are looked at, of a long one some from its first to its last
WRONG = 0.3  # of the image's attention, in a loss: how little of it may be nowhere


class EnoughError(Exception):
    """Ends a forward pass at the last block that is asked for."""


@dataclass(frozen=True)
class Kept:
    """A sample's hidden states by block (L, D), and image tokens (M, D), in bfloat16.

    found: of answer tokens, which image token and which of the words there, none for those that are nowhere.
    """

    sample: Sample
    states: dict[int, Tensor]
    image: Tensor
    found: list[tuple[int, int, int]]


@torch.no_grad()
def keep(
    model: Any, slots: Slots, encoder: PageEncoder, samples: Sequence[Sample], blocks: Sequence[int], seed: int
) -> list[Kept]:
    """Runs samples through the model up to the last of some blocks.

    Args:
        model: In float32, whose fusion layers at work are set; it runs in bfloat16.
        slots: What stands for its projector.
        encoder: Knows the codes of words.
        samples: Pages with questions and answers.
        blocks: Whose states after the input norm are kept.
        seed: Of the noise of image tokens.

    Returns:
        What is kept of each, in order.
    """
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].prompt) + len(samples[number].answer))
    states: dict[int, Tensor] = {}

    def hook(block: int) -> Callable[..., None]:
        def read(module: nn.Module, given: Any, output: Tensor) -> None:
            states[block] = output.bfloat16()
            if block == max(blocks):
                raise EnoughError

        return read

    hooks = [model.decoder.blocks[block].input_layernorm.register_forward_hook(hook(block)) for block in blocks]
    projector, model.projector = model.projector, slots
    model.bfloat16()
    found: dict[int, Kept] = {}
    try:
        for first in range(0, len(order), 24):
            some = order[first : first + 24]
            batch = batch_of([samples[number] for number in some], encoder, np.random.default_rng((seed, first)))
            try:
                with torch.autocast("cpu", torch.bfloat16):
                    model(**batch.inputs, use_cache=False, logits_to_keep=1)
            except EnoughError:
                pass
            images = slots(batch.inputs["image_features"], None).bfloat16()
            starts = np.cumsum((0, *batch.inputs["image_grid_thw"].prod(1).tolist()))
            for row, number in enumerate(some):
                real = batch.inputs["attention_mask"][row].bool()
                mine = batch.where[batch.where[:, 0] == row]
                begin = int((~real).sum()) + len(samples[number].prompt) - 1
                places = [(at - begin, token - int(starts[row]), slot) for _, at, token, slot in mine.tolist()]
                kept = {block: states[block][row][real].clone() for block in blocks}
                found[number] = Kept(samples[number], kept, images[starts[row] : starts[row + 1]].clone(), places)
    finally:
        for handle in hooks:
            handle.remove()
        model.projector = projector
        model.float()
    return [found[number] for number in range(len(samples))]


@dataclass(frozen=True)
class Rows:
    """Pictures side by side, each with the text from there on, of one block.

    text: (B, L, D). image: (B, M, D), of root mean square 1. is_image: bool, without padding. at: int64 (B, K), tokens
    that say the next one. said: int64 (B, K), the next one's id. told: int64 (B, K, G), the image token that tells it,
    -1 for none, -2 for padding. is_first: bool (B, K), whether that is an answer's first. wanted: bool (B, L), whether
    it says what is asked for.
    """

    text: Tensor
    image: Tensor
    is_image: Tensor
    at: Tensor
    said: Tensor
    told: Tensor
    is_first: Tensor
    wanted: Tensor


def rows_of(kept: Sequence[Kept], block: int) -> Rows:
    """Pads kept samples at the right."""
    chosen = [
        np.unique(np.linspace(0, len(one.sample.answer) - 1, ANSWERED).round().astype(int)).tolist() for one in kept
    ]
    length, tokens = (
        max(sizes) for sizes in zip(*((len(one.states[block]), len(one.image)) for one in kept), strict=True)
    )
    answer = max(map(len, chosen))
    width, count = kept[0].image.shape[1], len(kept)
    text, image = torch.zeros(count, length - IMAGE_AT, width), torch.zeros(count, tokens, width)
    is_image = torch.zeros(count, tokens, dtype=torch.bool)
    at, said = torch.zeros(count, answer, dtype=torch.long), torch.zeros(count, answer, dtype=torch.long)
    told, is_first = torch.full((count, answer, 3), -2), torch.zeros(count, answer, dtype=torch.bool)
    wanted = torch.zeros(count, length - IMAGE_AT, dtype=torch.bool)
    is_first[:, 0] = True
    for row, (one, some) in enumerate(zip(kept, chosen, strict=True)):
        n, m, k, prompt = len(one.states[block]) - IMAGE_AT, len(one.image), len(some), len(one.sample.prompt)
        text[row, :n], image[row, :m], is_image[row, :m] = one.states[block][IMAGE_AT:], one.image, True
        at[row, :k], told[row, :k] = prompt - 1 - IMAGE_AT + torch.tensor(some), -1
        said[row, :k] = torch.tensor(one.sample.answer)[some]
        wanted[row, : prompt - IMAGE_AT] = torch.tensor(one.sample.wanted)[IMAGE_AT:]
        for number, token, slot in one.found:
            if number in some:
                told[row, some.index(number), slot] = token
    return Rows(text, even(image), is_image, at, said, told, is_first, wanted)


def even(image: Tensor) -> Tensor:
    """Image tokens (..., D) as a block's norm has them before its gain, of root mean square 1."""
    return image * torch.rsqrt(image.square().mean(-1, keepdim=True) + 1e-5)


def attention(layer: Any, rows: Rows, gain: Tensor) -> Tensor:
    """Log-probabilities (B, K, G, 3, M + L) of a layer's heads, image tokens first. gain: (D,), of the block's norm."""
    size, (_, length, width) = layer.head_dim, rows.text.shape
    asking = rows.text.gather(1, rows.at[..., None].expand(-1, -1, width))
    query = turned(layer.q_proj(asking).unflatten(-1, (-1, size)), rows.at[..., None]).unflatten(2, (3, -1))
    text = turned(layer.k_proj(rows.text).unflatten(-1, (-1, size)), torch.arange(length)[:, None])
    image = layer.k_proj(rows.image * gain).unflatten(-1, (-1, size))
    sees = torch.arange(length) <= rows.at[..., None]
    scores = [
        torch.einsum("bkghc,bmgc->bkghm", query, image).masked_fill(~rows.is_image[:, None, None, None], -torch.inf),
        torch.einsum("bkghc,blgc->bkghl", query, text).masked_fill(~sees[:, :, None, None], -torch.inf),
    ]
    return (torch.cat(scores, dim=-1) / size**0.5).log_softmax(-1)


def asked_loss(shares: Tensor, rows: Rows) -> tuple[Tensor, float]:
    """How far one head's attention is from an even look at all wanted words (nats); and its share on them."""
    ours = shares[:, :, ASKED_HEAD, 0, rows.image.shape[1] :]
    wanted = rows.wanted.float()
    some = (wanted.sum(1) > 0)[:, None] & (rows.told[..., 0] > -2)
    evenly = wanted / wanted.sum(1, keepdim=True).clamp(min=1)
    nats = -(evenly[:, None] * ours.clamp(min=-30)).sum(-1) - torch.special.entr(evenly).sum(-1)[:, None]
    return nats[some].mean(), (ours.exp() * wanted[:, None]).sum(-1)[some].mean().item()


def found_loss(shares: Tensor, rows: Rows, role: str) -> tuple[Tensor, float]:
    """What the heads' votes together miss, and looks at pictures that tell nothing (nats); share found."""
    tokens = rows.image.shape[1]
    votes, text = shares[..., :tokens].exp(), shares[..., tokens:].logsumexp(-1)
    is_first = rows.is_first[..., None].expand_as(rows.told)
    known, told = rows.told >= 0, rows.told.clamp(min=0)
    if role in ("first", "again"):  # all heads have the same word
        mine, silent = (known & is_first)[..., 0], (rows.told > -2) & ~is_first
        all_votes, target = votes.flatten(2, 3).sum(2)[mine], told[..., 0][mine]
    else:
        where = known & ~is_first if role == "later" else known
        silent = (rows.told > -2) & ~where
        all_votes, target = votes.sum(3)[where], told[where]
    right = all_votes.gather(-1, target[..., None])[..., 0]
    missed = (all_votes.sum(-1) + WRONG).log() - (right + 1e-6).log()
    hit = (all_votes.argmax(-1) == target).float().sum().item() / max(1, len(target))
    return missed.sum() / max(1, len(target)) - 0.5 * text[silent].sum() / max(1, text[silent].numel()), hit


Loss = Callable[[Tensor, Rows], tuple[Tensor, float]]


def learn(
    layer: Any,
    block: int,
    kept: Sequence[Kept],
    gain: Tensor,
    loss: Loss,
    steps: int,
    rate: float,
    batch: int = 64,
) -> Iterator[tuple[int, float, float]]:
    """Trains a layer's queries and keys. Yields step, loss and share found."""
    learned = [layer.q_proj.weight, layer.k_proj.weight]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        numbers = np.random.default_rng((block, step)).integers(len(kept), size=batch)
        rows = rows_of([kept[number] for number in numbers], block)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
        missed, share = loss(attention(layer, rows, gain), rows)
        missed.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1, missed.item(), share


@torch.no_grad()
def values_of(
    layer: Any, block: int, kept: Sequence[Kept], start: Start, parts: Sequence[tuple[int, slice]]
) -> list[Tensor]:
    """Maps (numbers, D) from what heads look at to the code of the word found, by least squares.

    Of text, at which a head looks that has nothing to say, they are to read next to nothing.

    Args:
        layer: Whose queries and keys have learned.
        block: Its block.
        kept: Samples with states of that block.
        start: What is known of the model.
        parts: By key head, which of the words of an image token, from 0, and which numbers of its code.
    """
    gain, width = start.gains[block], start.codes.shape[1]
    second = [torch.zeros(len(gain), len(gain), dtype=torch.float64) for _ in parts]
    told = [torch.zeros(len(gain), some.stop - some.start, dtype=torch.float64) for _, some in parts]
    for first in range(0, len(kept), 64):
        rows = rows_of(kept[first : first + 64], block)
        shares = attention(layer, rows, gain).exp()
        seen = torch.cat([rows.image * gain, rows.text], dim=1)
        real = rows.told[..., 0] > -2
        for head, (word, some) in enumerate(parts):
            looked = torch.einsum("bkhn,bnd->bkhd", shares[:, :, head], seen)[real].flatten(0, 1).double()
            token = rows.told[..., word]
            right = shares[:, :, head].gather(-1, token.clamp(min=0)[..., None, None].expand(-1, -1, 3, 1))
            right = right * (token >= 0)[..., None, None]
            code = start.codes[rows.said][:, :, None, some] * width**0.5 * right
            second[head] += looked.T @ looked
            told[head] += looked.T @ code[real].flatten(0, 1).double()
    return [least_squares(*both, 1e-3).T.float() for both in zip(second, told, strict=True)]


def say_found(layer: Any, block: int, role: str, kept: Sequence[Kept], start: Start, half: int, aloud: bool) -> None:
    """Sets what a layer says of what it has learned to find. half, aloud: as in `Start.numbers`."""
    words = (0, 0, 0) if role in ("first", "again") else (0, 1, 2)
    parts = [(word, start.numbers(len(TAGS) + BEFORE + word, half, aloud)) for word in words]
    values = values_of(layer, block, kept, start, parts)
    start.say(layer, block, [(some, read) for (_, some), read in zip(parts, values, strict=True)], aloud)


@dataclass(frozen=True)
class Closed:
    """Queries and keys in closed form, by a guess of codes from hidden states.

    Attributes:
        start: What is known of the model.
        line_break: Id of the token that stands before a text.
        asked, placed, begins, next, last: Nats that a comparison is worth where all is right: of tags, of places, of
            where texts begin, of the next word; and of the last one, the one before it and the one before that.
        sink: Nats that "nothing here" scores.
    """

    start: Start
    line_break: int
    asked: float = 25.0
    placed: float = 10.0
    begins: float = 8.0
    next: float = 14.0
    last: tuple[float, float, float] = (25.0, 12.0, 8.0)
    sink: float = 6.0

    @torch.no_grad()
    def first(self, layer: Any, block: int, kept: Sequence[Kept], again: bool) -> None:
        """Sets a layer that finds a text by its tags; again, half of its numbers are for places that were handed on."""
        known = [(one, asked) for one in kept if (asked := self._asked_for(one.sample)) is not None]
        states = torch.stack([one.states[block][len(one.sample.prompt) - 1].float() for one, _ in known])
        told = self._guessed(states, torch.stack([asked for _, asked in known]))
        queries, keys, constant = self._silent(layer, block)
        before = len(TAGS) + BEFORE - 1
        line_break = self.start.codes[self.line_break, : self.start.known(before)] * self.start.codes.shape[1] ** 0.5
        begins = line_break @ self._read(block, before, len(line_break)) / line_break.square().sum()
        near = self._placed(block, kept) * layer.head_dim**0.5 * self.placed if again else None
        for head, ((first, stop), tags) in enumerate(AGAIN if again else ASKING):
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
                query[BEGINS] = constant * layer.head_dim**0.5 * self.begins
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


def begin_asking(layer: Any, block: int, role: str, kept: Sequence[Kept], closed: Closed) -> float:
    """Sets what a layer's queries and keys learn from. Returns at which rate they do."""
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
    return {"asked": 2e-3, "later": 1e-3}.get(role, 3e-4)


def share_asked(layer: Any) -> None:
    """The third key head carries further numbers of what the second one looks at."""
    queries, keys, *_ = heads_of(layer)
    group = len(queries) // len(keys)
    with torch.no_grad():
        for rows, step in ((queries, group), (keys, 1)):
            rows[(ASKED_HEAD + 1) * step] = rows[ASKED_HEAD * step]


def loss_of(role: str) -> Loss:
    """What a role is to learn."""
    return asked_loss if role == "asked" else partial(found_loss, role=role)
