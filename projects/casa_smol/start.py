"""What fusion begins with in closed form: codes of words, where image tokens keep them, and what layers say.

SmolLM2 stays frozen, and has to be told word by word what a picture says. An image token tells which words begin in it,
which three stand before these, and by what its text may be asked for (`casa.vision.page_words`). Words are told by
codes: numbers that hidden states of the text model foretell, those foretold best first.

The first layer hands codes on to where they are needed, the two words before the last and what is asked for, in
directions of the stream that the text model hardly reads. The layers that follow find the next word and hand its code
on in the same way; the last ones say it, as the embedding that the text model's head knows. Where they look is
learned (`finding.py`).

Shapes: D width of the text model (576), H heads, C of a head (64), V words, W numbers of a code.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casa import FusionConfig
from casa.vision.page_encoder import WAVES
from casa.vision.page_words import BEFORE, TAGS

Stage = tuple[dict[int, str], bool]
"""Roles by block of layers that learn on the same states (`finding.py`), and whether they say aloud what they find."""
STAGES: tuple[Stage, ...] = (
    ({2: "asked"}, False),
    ({5: "first"}, False),
    ({8: "later"}, False),
    ({11: "again"}, False),
    ({14: "later", 17: "later", 20: "next", 23: "next", 26: "later", 29: "next"}, True),
)
LAYERS = tuple(block for roles, _ in STAGES for block in roles)
FUSION = FusionConfig.parallel(layers=LAYERS, output="zero", projector="linear")
# queries are turned for a picture so many tokens before them; other pairs turn by more than half a radian in 15 more
DISTANCE = 25
STILL = torch.cat([torch.arange(9, 31), torch.arange(41, 63)])
SINK = 31  # of the slowest pair
FAST = 5  # pairs that turn the fastest
TURNS = 100_000.0 ** -(torch.arange(32) / 32)  # radians a token, by pair
UNSEEN = 20.0  # nats that image tokens are below text in the first layer
LARGEST = 2.5  # of a code's numbers, beside those of a random one: no number says a word alone
PLACED = 0.1  # length of a place's waves, beside words of length 1
TAGGED = 0.6  # of tags: of what is written there, it is the least certain
CONSTANT = 2.0  # of an image token, on the calmest axis: what tells it from text, and keeps its length
HANDED = {
    "before": slice(0, 48), "asked": slice(48, 132), "found": slice(132, 196), "places": slice(196, 256),
    "own": slice(256, 304), "earlier": slice(304, 352),
}  # fmt: skip
"""Which of the stream's quiet axes carry the code of the word before, of what is asked for, of the word found, the
places where the three key heads of layers have looked for it, and the codes of a token's own word and of the one two
before it."""
PLACES = [first + octave for first in (0, WAVES, 2 * WAVES, 3 * WAVES) for octave in range(1, 6)]
"""Which waves of a place are handed on: from 64 to 1,024 px, of its height and of its width."""
ASKED = 84  # numbers of the code of what is asked for
CARRIED = 64  # numbers that a head carries
TOLD = 0.6  # length of what is handed on, beside the stream's
SAID = 100.0  # of a word's embedding that one layer says; the stream is 650 long at the last


@dataclass
class Moments:
    """Of hidden states (after a block's norm) over text: sums, by block.

    first: (D,). second: (D, D). told: (D, T), with what a state is of (`codes`). sizes: median length of the stream
    before the norm. among: (T, T), of what is told with itself. count: of tokens.
    """

    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    told: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    among: Tensor | float = 0.0
    count: int = 0

    def solved(self, block: int) -> Tensor:
        """(D, T) float64: least squares, from a hidden state to its word's code."""
        return least_squares(self.second[block], self.told[block], 1e-4)


@torch.no_grad()
def moments(model: Any, texts: Iterable[Tensor], codes: Tensor, blocks: Sequence[int]) -> Moments:
    """Runs the fused model over texts (B, L) that stand behind an empty picture, from the fifth token on.

    The first one's state is far larger than all others, and a picture stands before the fourth. codes: (V, T).
    """
    found = Moments()
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(block: int) -> Any:
        return lambda module, given, output: states.__setitem__(block, (given[0].float(), output.float()))

    hooks = [model.decoder.blocks[block].input_layernorm.register_forward_hook(keep(block)) for block in blocks]
    try:
        for ids in texts:
            with blank(model, len(ids)) as picture:
                model(input_ids=ids, **picture, use_cache=False, logits_to_keep=1)
            targets = codes[ids[:, 4:]].flatten(0, 1)
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
    model: Any, texts: Iterable[Tensor], embeddings: Tensor, size: int, blocks: Sequence[int] = LAYERS[1:]
) -> Tensor:
    """(V, size), of length 1 or a little less: what hidden states foretell of the word they are of, best first.

    Canonical directions of the embeddings (V, D), on average over some blocks of the text model.
    """
    seen = moments(model, texts, embeddings, blocks)
    assert isinstance(seen.among, Tensor)
    foretold = torch.zeros_like(seen.among)
    for block in blocks:
        foretold += seen.told[block].T @ seen.solved(block)
    every = seen.among + 1e-3 * seen.among.diagonal().mean() * torch.eye(len(seen.among))
    values, directions = torch.linalg.eigh(every)
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
        self.words, self.tags = slice(1, starts[-1]), slice(1, starts[len(TAGS)])
        self.places = slice(starts[-1], starts[-1] + 4 * WAVES)
        self.axes = axes

    def forward(self, tokens: Tensor, grids: Any) -> Tensor:
        """tokens: (N, written + P): codes of words, then the place. Returns (N, D). Stands for the projector."""
        image = torch.zeros(len(tokens), len(self.axes))
        image[:, self.words] = tokens[:, : -4 * WAVES]
        image[:, self.tags] *= TAGGED
        image[:, self.places] = tokens[:, -4 * WAVES :] * PLACED
        image[:, 0] = CONSTANT
        return image @ self.axes

    def read(self, slot: int, numbers: slice) -> Tensor:
        """(n, D): from an image token to some numbers of a slot's code, each of variance 1 over words."""
        rows = self.axes[self.spans[slot]]
        return rows[numbers] * len(rows) ** 0.5 / (TAGGED if slot < len(TAGS) else 1.0)

    @torch.no_grad()
    def into(self, projector: Any, width: int) -> None:
        """Makes a linear projector the same map of an encoder's tokens; what is between words and places does nothing.

        width: d_v, of the encoder.
        """
        places = 4 * WAVES
        image = torch.zeros(len(self.axes), projector.map.in_features)
        written = self.words.stop - self.words.start
        image[self.words, :written] = torch.eye(written)
        image[self.tags] *= TAGGED
        image[self.places, width - places : width] = torch.eye(places) * PLACED
        projector.map.weight.copy_(self.axes.T @ image)
        projector.map.bias.copy_(CONSTANT * self.axes[0])


@dataclass(frozen=True)
class Spread:
    """How text varies before the norms' gains, on average over some blocks: of what is 1 over a gain behind it.

    varied: (D, D), second moments. means: (D,), by block. common: (4, D), orthonormal, what all means have in common.
    """

    varied: Tensor
    means: dict[int, Tensor]
    common: Tensor

    @classmethod
    def of(cls, seen: Moments, gains: dict[int, Tensor]) -> "Spread":
        """gains: of the blocks' norms, all of them."""
        means = {block: (seen.first[block] / seen.count).float() / gain for block, gain in gains.items()}
        varied = torch.stack(
            [(seen.second[block] / seen.count).float() / gain[:, None] / gain[None] for block, gain in gains.items()]
        ).mean(0)
        common = torch.linalg.svd(torch.stack(list(means.values())), full_matrices=False)[2][:4]
        return cls(varied, means, common)

    def axes(self, seen: Tensor) -> Tensor:
        """(D, D) orthonormal directions, those first of which some second moments (D, D) have least; the means last."""
        common = self.common.double()
        rest = torch.eye(len(seen)) - common.T @ common
        seen = rest @ seen.double() @ rest
        last = 10 * seen.trace() * common.T @ common
        return torch.linalg.eigh(seen + last)[1].T.float().contiguous()

    def calm(self) -> Tensor:
        """(D, D) directions, those first in which text varies least."""
        return self.axes(self.varied)

    def quiet(self, model: Any) -> Tensor:
        """(D, D) directions, those first that the text model hardly reads, and in which it hardly writes.

        What is written there does it little harm, and can still be read many blocks above.
        """
        read = torch.zeros_like(self.varied)
        for block in model.decoder.blocks:
            for norm, modules in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                for module in modules:
                    weight = module.weight.detach().float() * norm.weight.detach().float()
                    read += weight.T @ weight / weight.square().sum()
        varied = self.varied.trace() - (self.common @ self.varied * self.common).sum()
        return self.axes(read / read.trace() + self.varied / varied)


@dataclass(frozen=True)
class Start:
    """What is known of a text model before its layers learn.

    slots: stands for the projector. length: of an image token (root mean square) in which text begins. gains: of the
    blocks' norms (D,). constants: (D,), from a hidden state to 1 if it is of text. sizes: of the stream. quiet: (D, D),
    axes that are hardly read. codes: (V, W). spoken: (D, W), from a word's code to what makes the text model say it.
    own, named: (D, W), from a hidden state of the first layer's block to its word's code, and to that of the token
    which tags have for it. names: int64 (V,), these tokens.
    """

    slots: Slots
    length: float
    gains: dict[int, Tensor]
    constants: dict[int, Tensor]
    sizes: dict[int, float]
    quiet: Tensor
    codes: Tensor
    spoken: Tensor
    own: Tensor
    named: Tensor
    names: Tensor

    @torch.no_grad()
    def hand_on(self, model: Any) -> None:
        """Sets the first layer: a key head has the last words, the next one what is asked for, once it has learned."""
        block = min(self.gains)
        layer = model.casa_layers[str(block)]
        queries, keys, values, output = heads_of(layer)
        for part in (queries, keys, values, output):
            part.zero_()
        size, group, root = layer.head_dim, len(queries) // len(keys), layer.head_dim**0.5
        constant, gain = self.constants[block], self.gains[block]
        near = constant * (root * 40.0 / FAST) ** 0.5
        keys[0][:FAST] = near
        words = ("own", "before", "earlier")
        for back in range(len(words)):  # turned by so many tokens, a query is the key of the one that stood there
            queries[back][:FAST] = (back * TURNS[:FAST]).cos()[:, None] * near
            queries[back][size // 2 : size // 2 + FAST] = -(back * TURNS[:FAST]).sin()[:, None] * near
        image = self.slots.axes[0] * self.length / CONSTANT  # before the gain, to 1 where text begins
        asked = self.quiet[HANDED["asked"]].split(CARRIED), self.named[:, :ASKED].split(CARRIED, dim=1)
        parts = [(back, self.quiet[HANDED[name]], self.own) for back, name in enumerate(words)]
        parts += [(query * group, *part) for query, part in enumerate(zip(*asked, strict=True), 1)]
        for query, axes, told in parts:
            count, head = len(axes), query // group
            values[head][:count] = told[:, :count].T
            keys[head][SINK] = -image / gain * root * UNSEEN
            queries[query][SINK] = constant
            # of a code of length 1
            length = self.sizes[block] * TOLD * (self.codes.shape[1] / (count if head == 0 else ASKED)) ** 0.5
            output[:, query, :count] = axes.T * length

    def known(self, slot: int) -> int:
        """How many numbers of a slot's code image tokens tell."""
        return self.slots.spans[slot].stop - self.slots.spans[slot].start

    def numbers(self, slot: int, half: int, aloud: bool) -> slice:
        """Which numbers of a slot's code one layer carries: a long code is said aloud in halves."""
        known = self.known(slot)
        first = CARRIED * half if aloud and known >= 2 * CARRIED else 0
        return slice(first, min(first + (CARRIED if aloud else CARRIED - len(PLACES)), known))

    def places(self, block: int) -> Tensor:
        """(n, D): from an image token behind a block's norm to the `PLACES` of where it stands."""
        return self.slots.axes[self.slots.places][PLACES] / PLACED / self.gains[block] * self.length

    @torch.no_grad()
    def say(self, layer: Any, block: int, found: Sequence[tuple[slice, Tensor]], aloud: bool) -> None:
        """Sets what a layer says of the words it finds.

        Args:
            layer: Of CASA.
            block: Its block.
            found: By key head, which numbers of a code it carries, and the map (numbers, D) to them, of variance 1.
            aloud: As an embedding for the model's head; else as a code for the layers that follow, and with the last
                numbers of each key head the place where it looks.
        """
        _, _, values, output = heads_of(layer)
        values.zero_()
        output.zero_()
        group, width = output.shape[1] // len(values), self.codes.shape[1]
        # outputs learn as fast as the stream is long
        scale = self.sizes[block] / width**0.5 if aloud else 1.0
        for head, (some, read) in enumerate(found):
            values[head][: len(read)] = read * scale
            if aloud:
                said = self.spoken[:, some] * SAID / width**0.5 / scale
            else:
                said = self._axes("found")[1][: len(read)].T * self.sizes[block] * TOLD / len(read) ** 0.5
            for query in range(head * group, (head + 1) * group):
                output[:, query, : len(read)] = said
            if not aloud:
                count, (_, axes) = len(PLACES), self._axes("places")
                values[head][-count:] = self.places(block)
                told = axes[head * count : (head + 1) * count].T * self.sizes[block] * TOLD / count**0.5
                output[:, head * group : (head + 1) * group, -count:] = told[:, None]

    def _axes(self, name: str) -> tuple[int, Tensor]:
        """How many numbers are handed on, and where."""
        axes = self.quiet[HANDED[name]]
        return len(axes), axes


def start_of(
    model: Any,
    texts: Sequence[Tensor],
    codes: Tensor,
    embeddings: Tensor,
    sizes: Sequence[int],
    written: Tensor,
    names: Tensor,
    layers: Sequence[int] = LAYERS,
) -> Start:
    """Looks at a model whose layers say nothing yet.

    Args:
        model: A Llama-family model in float32, adapted with `LAYERS`, three query heads to a key head, three key heads.
        texts: (B, L) each, to fit on.
        codes: (V, W), of words.
        embeddings: (V, D), of length 1.
        sizes: Widths of the slots' codes.
        written: (N, codes and places) of some pages.
        names: int64 (V,), the token that tags have for each.
        layers: Blocks that have one; the first one's hands on.
    """
    gains = {block: model.decoder.blocks[block].input_layernorm.weight.detach().float() for block in layers}
    seen = moments(model, texts, torch.cat([codes, codes[names]], dim=1), layers)
    spread = Spread.of(seen, gains)
    slots, own = Slots(spread.calm(), sizes), len(TAGS) + BEFORE
    begins = written[written[:, sum(sizes[:own]) : sum(sizes[: own + 1])].norm(dim=1) > 0.5]
    length = slots(begins, None).square().mean(-1).sqrt().mean().item()
    gain = model.decoder.stack.norm.weight.detach().float()
    spoken = torch.linalg.lstsq(codes, embeddings).solution.T / gain[:, None]
    constants = {block: mean / mean.square().sum() / gains[block] for block, mean in spread.means.items()}
    own_word, name = seen.solved(layers[0]).float().chunk(2, dim=1)
    quiet = spread.quiet(model)
    return Start(slots, length, gains, constants, seen.sizes, quiet, codes, spoken, own_word, name, names)


def heads_of(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views: queries (H, C, D), keys and values (G, C, D) and outputs (D, H, C) of a layer."""
    size = layer.head_dim
    queries, keys, values = (
        getattr(layer, name).weight.unflatten(0, (-1, size)) for name in ("q_proj", "k_proj", "v_proj")
    )
    return queries, keys, values, layer.o_proj.weight.unflatten(1, (-1, size))


def turned(heads: Tensor, places: Tensor) -> Tensor:
    """Heads (..., C) as rotary positions turn them, at places that broadcast to (...)."""
    angles = places[..., None] * TURNS
    cos, sin = angles.cos(), angles.sin()
    low, high = heads.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def least_squares(second: Tensor, told: Tensor, ridge: float) -> Tensor:
    """(D, T), from moments (D, D) and (D, T). ridge: how much is added to the diagonal, in its mean."""
    return torch.linalg.solve(second + ridge * second.diagonal().mean() * torch.eye(len(second)), told)
