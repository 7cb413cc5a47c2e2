"""Where to look: queries and keys of the fusion layers, learned one layer after the other on hidden states kept once.

Hidden states of a frozen model change only with what layers below them say. So the text model runs once over some
thousand questions, up to the layer's block, and its queries and keys learn on what is kept, for a small part of what a
step through the whole model costs; then come others. Layers have one of five roles:

- "asked", the first one: which words of a question say what is asked for. Their codes are handed on.
- "first": with which text an answer begins: whose tags have most in common with what is asked for.
- "again": the same, by the places too where the first layer's heads have looked: one for a row, another for a column.
- "later": which word comes next, by the last three.
- "next": the word that layers below have found, by its code and its place.

Those of the last stage say the word aloud (`start.STAGES`); all others but the first hand on, for layers that follow,
its code and where each of their heads looks.

They begin in closed form (`closed_form.py`).

Shapes: B samples, L text tokens, M image tokens, K answer tokens, D width (576), C of a head (64). Three query heads
ask each of the three key heads (G), which know the first, second and third word that begins in an image token.
"""

from collections.abc import Callable, Sequence
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
    Slots,
    Start,
    least_squares,
    turned,
)

ASKED_HEAD = 1  # key head of the first layer that hands on what is asked for
ANSWERED = 12  # words of an answer that are looked at, of a long one some from its first to its last
WRONG = 0.3  # of the image's attention, in a loss: how little of it may be nowhere
LEARNING = {"asked": (2e-3, 4), "first": (8e-4, 30), "again": (8e-4, 16), "later": (1e-3, 4), "next": (3e-4, 4)}
"""By role: the rate, and how many rounds of new samples."""


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


def loss_of(role: str) -> Loss:
    """What a role is to learn."""
    return asked_loss if role == "asked" else partial(found_loss, role=role)


class Finder:
    """Trains a layer's queries and keys, round by round: each sample is seen a few times at most.

    On some thousand samples kept for good a layer learns the pages by heart.

    Args:
        layer: Of CASA.
        block: Its block.
        gain: (D,), of the block's norm.
        role: What it is to find.
        steps: Of all rounds together.
        rate: Of the first half; then it falls to nothing.
    """

    def __init__(self, layer: Any, block: int, gain: Tensor, role: str, steps: int, rate: float) -> None:
        self.layer, self.block, self.gain, self.role = layer, block, gain, role
        self.step, self.steps, self.rate = 0, steps, rate
        self.learned = [layer.q_proj.weight, layer.k_proj.weight]
        self.optimizer = torch.optim.AdamW(self.learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)

    def learn(self, kept: Sequence[Kept], steps: int, batch: int = 64) -> tuple[float, float]:
        """Goes some steps on. Returns the loss and the share found, on average."""
        run = []
        for _ in range(steps):
            self.step += 1
            numbers = np.random.default_rng((self.block, self.step)).integers(len(kept), size=batch)
            rows = rows_of([kept[number] for number in numbers], self.block)
            for group in self.optimizer.param_groups:
                left = self.steps - self.step + 1
                group["lr"] = self.rate * min(1.0, self.step / 20, left / (0.6 * self.steps))
            missed, share = loss_of(self.role)(attention(self.layer, rows, self.gain), rows)
            missed.backward()
            nn.utils.clip_grad_norm_(self.learned, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            run.append((missed.item(), share))
        missed, share = np.mean(run, axis=0).tolist()
        return missed, share


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
