"""How fusion begins: layers that find and copy what is written, set in closed form before any step of training.

SmolLM2 stays frozen, and has to be told word by word what the picture says. An image token tells which words begin in
it, which two stand before these, and by what its text may be asked for (`casa.vision.page_words`). Of the text, a
layer has to know as much: the word just said, the one before it, and what was asked.

Words are told by codes: numbers that hidden states of the text model foretell, those foretold best first. The first
layer moves codes to where they are needed: one head looks at the token before, two look at all words that a question
does not share with other questions, and write them into the stream in directions that the text model hardly reads. In
every other layer each of the three key heads compares what is foretold with what an image token tells: what was asked
with the tags, and the last two words with those before a word that begins there; its value is that word. The last
layers write it into the stream as the embedding that the text model's head knows. Text tokens are keys for "nothing
here".

Shapes: D width of the text model (576), C of a head (64), S slots of an image token, V words, W numbers of a code.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casa.vision.page_encoder import WAVES
from casa.vision.page_words import BEGUN

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
TELLING = LAYERS[0]
SPEAKING = (20, 23, 26, 29)
# queries are turned for a picture so many tokens before them; other pairs turn by more than half a radian in 15 more
DISTANCE = 25
STILL = torch.cat([torch.arange(9, 31), torch.arange(41, 63)])
SINK = 31  # of the slowest pair
FAST = 5  # pairs that turn the fastest
TURNS = 100_000.0 ** -(torch.arange(32) / 32)  # radians a token, by pair
UNSEEN = 20.0  # nats that image tokens are below text in the first layer
LARGEST = 2.5  # of a code's numbers, beside those of a random one: no number says a word alone
LINEAR = 6.0  # GELU is the identity from here on
PLACED = 0.1  # length of a place's waves, beside words of length 1
TAGGED = 0.35  # of a tag: there may be many of them, and an image token's length counts
CONSTANT = 2.0  # of an image token, on the calmest axis: what tells it from text, and keeps its length
COMPARED = {"asked": 11, "before": 11, "said": 22}
"""Numbers of each code that a head compares: as many as stand still."""


@dataclass(frozen=True)
class Strengths:
    """How strong each part is: a search over a few values, scored without training.

    match: of the nats that a comparison is worth: numbers are not as independent as they are taken for. asked: of tags,
    beside words. sure: the largest share of a number's variance that counts as foretold. sink: nats
    that "nothing here" scores. said: of a word's embedding in the stream, whose length is 650 at the last layer.
    told: of what the first layer writes, beside its stream's length.
    """

    match: float = 0.25
    asked: float = 1.5
    sure: float = 0.8
    sink: float = 6.0
    said: float = 300.0
    told: float = 0.3


@dataclass
class Moments:
    """Of hidden states (after a block's norm) over text: sums, by block.

    first: (D,). second: (D, D). told: (D, T), with what a state is asked for (`told`). sizes: median length of the
    stream before the norm. among: (T, T), of what is told with itself. count: of tokens.
    """

    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    told: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    among: Tensor | float = 0.0
    count: int = 0

    def maps(self, block: int) -> tuple[Tensor, Tensor]:
        """(D, T) float32, from a hidden state to its guess; and (T,), which share of the variance that is."""
        found = self.solved(block)
        assert isinstance(self.among, Tensor)
        return found.float(), ((found * self.told[block]).sum(0) / self.among.diagonal()).float()

    def solved(self, block: int) -> Tensor:
        """(D, T) float64: least squares, from a hidden state to what it is asked for."""
        second = self.second[block]
        return torch.linalg.solve(second + 1e-4 * second.diagonal().mean() * torch.eye(len(second)), self.told[block])


@dataclass(frozen=True)
class Sentence:
    """Text without a picture. ids: (B, L). wanted: bool (B, L), the words that are asked for, padding nowhere."""

    ids: Tensor
    wanted: Tensor

    def told(self, codes: Tensor) -> Tensor:
        """(B, L - 4, 3 W + 1): codes of the word, of the one before and, on average, of those asked for; if it is one.

        From the fifth token: the first one's state is far larger than all others, and a picture stands before the
        fourth. codes: (V, W).
        """
        words, wanted = codes[self.ids], self.wanted[..., None].float()
        asked = (words * wanted).cumsum(1) / wanted.cumsum(1).clamp(min=1)
        return torch.cat([words[:, 4:], words[:, 3:-1], asked[:, 4:], wanted[:, 4:]], dim=-1)


@torch.no_grad()
def moments(model: Any, sentences: Iterable[Sentence], codes: Tensor, blocks: Sequence[int]) -> Moments:
    """Runs the fused model over sentences that stand behind an empty picture. codes: (V, W)."""
    found = Moments()
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(block: int) -> Any:
        return lambda module, given, output: states.__setitem__(block, (given[0].float(), output.float()))

    hooks = [model.decoder.blocks[block].input_layernorm.register_forward_hook(keep(block)) for block in blocks]
    try:
        for sentence in sentences:
            with blank(model, len(sentence.ids)) as picture:
                model(input_ids=sentence.ids, **picture, use_cache=False, logits_to_keep=1)
            targets = sentence.told(codes).flatten(0, 1)
            found.among = found.among + (targets.T @ targets).double()
            for block in blocks:
                stream, normed = (part[:, 4:].flatten(0, 1) for part in states[block])
                for sums, value in (
                    (found.first, normed.double().sum(0)),
                    (found.second, (normed.T @ normed).double()),
                    (found.told, (normed.T @ targets).double()),
                ):
                    sums[block] = sums[block] + value if block in sums else value
                found.sizes.setdefault(block, stream.norm(dim=-1).median().item())
            found.count += len(targets)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def codes_of_words(
    model: Any, sentences: Iterable[Sentence], embeddings: Tensor, size: int, blocks: Sequence[int] = LAYERS[1:]
) -> Tensor:
    """(V, size), of length 1 or a little less: what hidden states foretell of the word they are of, best first.

    Canonical directions of the embeddings (V, D), on average over some blocks of the text model.
    """
    seen = moments(model, sentences, embeddings, blocks)
    width = embeddings.shape[1]
    assert isinstance(seen.among, Tensor)
    every = seen.among[:width, :width]
    foretold = torch.zeros_like(every)
    for block in blocks:
        foretold += seen.told[block][:, :width].T @ seen.solved(block)[:, :width]
    values, directions = torch.linalg.eigh(every + 1e-3 * every.diagonal().mean() * torch.eye(width))
    white = directions * values**-0.5
    best = torch.linalg.eigh(white.T @ foretold @ white)[1].flip(1)[:, :size]
    codes = nn.functional.normalize(embeddings @ (white @ best).float(), dim=-1)
    return codes.clamp(-LARGEST / size**0.5, LARGEST / size**0.5)


@contextmanager
def blank(model: Any, rows: int, image_at: int = 3) -> Iterator[dict[str, Any]]:
    """Inputs for a picture of one image token with nothing in it, in each row."""
    width = model.decoder.stack.embed_tokens.weight.shape[1]
    kept, model.projector = model.projector, Empty(width)
    try:
        yield {
            "image_positions": torch.tensor([(row, image_at) for row in range(rows)]),
            "image_grid_thw": torch.ones(rows, 3, dtype=torch.long),
            "image_features": torch.zeros(rows, 1),
        }
    finally:
        model.projector = kept


class Empty(nn.Module):
    """Stands for the projector: image tokens of nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor, grids: Any) -> Tensor:
        """(N, d_v) to zeros (N, D)."""
        return tokens.new_zeros(len(tokens), self.width)


class Slots(nn.Module):
    """From an encoder's words and places to an image token of the text model: each slot on axes of its own.

    Axes are directions in which text varies little, so that keys of pictures and of text are told apart.

    Args:
        axes: (D, D), orthonormal rows, the calmest first.
        sizes: widths of the slots' codes.
    """

    def __init__(self, axes: Tensor, sizes: Sequence[int]) -> None:
        super().__init__()
        starts = np.cumsum((1, *sizes)).tolist()
        self.spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.words = slice(1, starts[-1])
        self.places = slice(starts[-1], starts[-1] + 4 * WAVES)
        self.axes = axes

    def forward(self, tokens: Tensor, grids: Any) -> Tensor:
        """tokens: (N, written + P): codes of words, then the place. Returns (N, D). Stands for the projector."""
        image = torch.zeros(len(tokens), len(self.axes))
        image[:, self.words] = tokens[:, : -4 * WAVES]
        image[:, self.spans[0]] *= TAGGED
        image[:, self.places] = tokens[:, -4 * WAVES :] * PLACED
        image[:, 0] = CONSTANT
        return image @ self.axes

    def read(self, slot: int, numbers: slice) -> Tensor:
        """(n, D): from an image token to some numbers of a slot's code, each of variance 1 over words."""
        rows = self.axes[self.spans[slot]]
        return rows[numbers] * len(rows) ** 0.5 / (TAGGED if slot == 0 else 1.0)

    @torch.no_grad()
    def into(self, projector: Any, tokens: Tensor) -> None:
        """Makes a projector the same linear map of an encoder's tokens; what is between words and places does nothing.

        tokens: (M, d_v) of the encoder, in which text begins: the projector's norm keeps their scale.
        """
        projector.norm.weight.fill_(tokens.std(dim=1, unbiased=False).median().item())
        projector.norm.bias.fill_(tokens.mean(dim=1).median().item())
        width, inputs, places = len(self.axes), tokens.shape[1], 4 * WAVES
        image, constant = torch.zeros(width, projector.up.in_features), torch.zeros(width)
        written = self.words.stop - self.words.start
        image[self.words, :written] = torch.eye(written)
        image[self.spans[0]] *= TAGGED
        image[self.places, inputs - places : inputs] = torch.eye(places) * PLACED
        constant[0] = CONSTANT
        projector.up.weight.copy_(image)
        projector.up.bias.copy_(constant + LINEAR)
        projector.down.weight.copy_(self.axes.T)
        projector.down.bias.copy_(-LINEAR * self.axes.sum(0))


def calm_axes(seen: Moments, gains: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """(D, D) directions, those in which text varies least first, its mean last; and means before the gain, by block.

    gains: of the blocks' norms, all of them: 1 over a gain is a hidden state before it.
    """
    means = {block: (seen.first[block] / seen.count).float() / gain for block, gain in gains.items()}
    spread = torch.stack(
        [(seen.second[block] / seen.count).float() / gain[:, None] / gain[None] for block, gain in gains.items()]
    ).mean(0)
    common = torch.linalg.svd(torch.stack(list(means.values())), full_matrices=False)[2][:4]
    rest = torch.eye(len(spread)) - common.T @ common
    return torch.linalg.eigh(rest @ spread @ rest + 1e6 * common.T @ common)[1].T.contiguous(), means


def _parts(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (H, C, D), keys and values (K, C, D) and outputs (D, H, C) of a layer, all zero now; views."""
    size = layer.head_dim
    found = [getattr(layer, name).weight.unflatten(0, (-1, size)) for name in ("q_proj", "k_proj", "v_proj")]
    found.append(layer.o_proj.weight.unflatten(1, (-1, size)))
    for part in found:
        part.zero_()
    return tuple(found)  # type: ignore[return-value]


def _constant(mean: Tensor, gain: Tensor) -> Tensor:
    """(D,): from a hidden state to 1, if it is of text."""
    return mean / mean.square().sum() / gain


def quiet_axes(model: Any, means: Iterable[Tensor]) -> Tensor:
    """(D, D) directions, those first that the text model reads least: what is written there does it little harm."""
    width = model.decoder.stack.norm.weight.numel()
    read = torch.zeros(width, width)
    for block in model.decoder.blocks:
        for norm, modules in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            for module in modules:
                weight = module.weight.detach().float() * norm.weight.detach().float()
                read += weight.T @ weight / weight.square().sum()
    common = torch.linalg.svd(torch.stack(list(means)), full_matrices=False)[2][:4]
    return torch.linalg.eigh(read + 1e6 * common.T @ common)[1].T.contiguous()


@torch.no_grad()
def set_first_layer(
    model: Any,
    seen: Moments,
    axes: Tensor,
    mean: Tensor,
    image: Tensor,
    width: int,
    sizes: tuple[int, int],
    strengths: Strengths,
) -> None:
    """Sets the layer that moves words: the one before, and those that were asked for.

    Args:
        model: a Llama-family model in float32, three query heads to a key head, three key heads.
        seen: of its text, at this layer's block.
        axes: directions that text hardly uses, the first ones are written to.
        mean: of text at this block, before the norm's gain.
        image: (D,), before the norm's gain to 1 for an image token in which text begins, to nearly 0 for text.
        width: W, numbers of a code.
        sizes: how many of them are written of both.
        strengths: Of each part.
    """
    layer = model.casa_layers[str(TELLING)]
    gain = model.decoder.blocks[TELLING].input_layernorm.weight.detach().float()
    queries, keys, values, output = _parts(layer)
    size, group = layer.head_dim, len(queries) // len(keys)
    root = size**0.5
    constant, told = _constant(mean, gain), seen.maps(TELLING)[0]
    before = (root * 40.0 / FAST) ** 0.5
    for pair in range(FAST):  # turned by one token, a query is the key of the token before
        keys[0][pair] = constant * before
        queries[0][pair] = constant * before * TURNS[pair].cos()
        queries[0][pair + size // 2] = -constant * before * TURNS[pair].sin()
    start = 0
    asked = [(first, min(first + size, sizes[1])) for first in range(0, sizes[1], size)]
    for number, (first, last) in enumerate([(0, sizes[0]), *asked]):
        count = last - first
        values[number][:count] = told[:, first:last].T
        if number:
            keys[number][SINK] = told[:, -1] * root * 9.0
        queries[number * group][SINK] = constant
        keys[number][SINK] -= image / gain * root * UNSEEN
        # of a code of length 1
        length = seen.sizes[TELLING] * strengths.told * (width / count) ** 0.5
        output[:, number * group, :count] = axes[start : start + count].T * length
        start += count


@torch.no_grad()
def set_layers(
    model: Any,
    seen: Moments,
    slots: Slots,
    means: dict[int, Tensor],
    length: float,
    spoken: Tensor,
    strengths: Strengths,
) -> None:
    """Sets queries, keys, values and outputs of all other layers.

    Args:
        model: a Llama-family model in float32, whose first layer is set.
        seen: of its text, with that layer at work.
        slots: where an image token keeps which word.
        means: of text, by block, before the norm's gain.
        length: of an image token (root mean square) in which text begins.
        spoken: (D, W), from a word's code to what makes the text model say it.
        strengths: Of each part.
    """
    head_gain = model.decoder.stack.norm.weight.detach().float()
    width = spoken.shape[1]
    for number, block in enumerate(LAYERS[1:]):
        layer = model.casa_layers[str(block)]
        gain = model.decoder.blocks[block].input_layernorm.weight.detach().float()
        queries, keys, values, output = _parts(layer)
        size, group = layer.head_dim, len(queries) // len(keys)
        told, shares = seen.maps(block)
        # nats: a guess of a number times the number, by the variance that is left
        guess = strengths.match * told * width**0.5 / (1 - shares.clamp(max=strengths.sure)) * size**0.5
        nothing = _constant(means[block], gain) * (size**0.5 * strengths.sink) ** 0.5
        for head in range(BEGUN):
            asking, row = range(head * group, (head + 1) * group), 0
            # tags, and the two words before the one that this head finds
            for name, slot, first in (("asked", 0, 2 * width), ("before", head + 1, width), ("said", head + 2, 0)):
                count = COMPARED[name]
                rows, row = STILL[row : row + count], row + count
                keys[head][rows] = slots.read(slot, slice(count)) / gain * length
                for asker in asking:
                    strength = strengths.asked if name == "asked" else 1.0
                    queries[asker][rows] = guess[:, first : first + count].T * strength
            keys[head][SINK] = nothing
            for asker in asking:
                queries[asker] = turned(queries[asker], -DISTANCE)
                queries[asker][SINK] = nothing
            # each layer carries another half of a code; outputs learn as fast as the stream is long
            known = slots.spans[head + 3].stop - slots.spans[head + 3].start
            first = size * (number % 2) if known >= 2 * size else 0
            some = slice(first, min(first + size, known))
            count, scale = some.stop - some.start, seen.sizes[block] / width**0.5
            values[head][:count] = slots.read(head + 3, some) / gain * length * scale
            if block in SPEAKING:
                out = spoken[:, some] * strengths.said / width**0.5 / scale / head_gain[:, None]
                output[:, asking[0], :count] = out


def turned(rows: Tensor, tokens: int) -> Tensor:
    """(C, D): a head's rows as rotary positions turn them from one token to one so many behind it."""
    low, high = rows.chunk(2)
    cos, sin = ((TURNS * tokens).cos()[:, None], (TURNS * tokens).sin()[:, None])
    return torch.cat([low * cos - high * sin, high * cos + low * sin])


def begin(
    model: Any,
    sentences: Sequence[Sentence],
    codes: Tensor,
    embeddings: Tensor,
    sizes: Sequence[int],
    written: Tensor,
    strengths: Strengths,
) -> Slots:
    """Sets all layers of a model whose layers say nothing yet. Returns what stands for its projector.

    Args:
        model: a Llama-family model in float32, adapted with `LAYERS`.
        sentences: text to fit on.
        codes: (V, W), of words.
        embeddings: (V, D), of length 1.
        sizes: widths of the slots' codes.
        written: (N, codes and places) of some pages.
        strengths: Of each part.
    """
    gains = {block: model.decoder.blocks[block].input_layernorm.weight.detach().float() for block in LAYERS}
    seen = moments(model, sentences, codes, LAYERS)
    axes, means = calm_axes(seen, gains)
    slots = Slots(axes, sizes)
    begins = written[written[:, sum(sizes[:2]) : sum(sizes[:3])].norm(dim=1) > 0.5]
    length = slots(begins, None).square().mean(-1).sqrt().mean().item()
    image = axes[0] * length / CONSTANT
    quiet = quiet_axes(model, means.values())
    width = codes.shape[1]
    set_first_layer(model, seen, quiet, means[TELLING], image, width, (sizes[1], sizes[0]), strengths)
    seen = moments(model, sentences, codes, LAYERS[1:])
    spoken = torch.linalg.lstsq(codes, embeddings).solution.T
    set_layers(model, seen, slots, means, length, spoken, strengths)
    return slots
