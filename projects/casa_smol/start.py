"""How fusion begins: layers that copy what is written, found in closed form before any step of training.

SmolLM2 stays frozen, and has to be told word by word what the picture says. In every layer, each of the three key heads
has one slot of an image token: its keys say which word stands before those that begin there, and queries which word was
just said. So the token where the text goes on is found. The last layers write what begins there into the stream, as the
embedding of the word, which the head of the text model knows.

A text on a page begins after a line break, as an answer does, and so is read from its beginning. Which text is meant
is left to training (`pretraining.py`), and so is what the first layers write. The word just said is told from a hidden
state by a linear map, fitted on text. Text tokens are keys for "nothing here": text without a match stays as it is.

Shapes: D width of the text model (576), V words, S slots of an image token: the word before, and those that begin
(1 + BEGUN), C width of a head (64).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casa.vision.page_encoder import WAVES, word_projection
from casa.vision.page_reading import BEGUN
from projects.casa_smol.words import Words

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
SPEAKING = (20, 23, 26, 29)
# rotary positions turn the others by more than half a radian within 60 tokens (theta 100,000, heads of 64)
STILL = torch.cat([torch.arange(13, 31), torch.arange(45, 63)])
SINK = 31  # of the slowest pair
LINEAR = 6.0  # GELU is the identity from here on
PLACED = 0.1  # length of a place's waves, beside words of length 1
CONSTANT = 2.0  # keeps the length of an image token in which nothing is written


@dataclass(frozen=True)
class Strengths:
    """How strong each part is: a search over a few values, scored without training.

    match: score of a perfect match. sink: share of it that "nothing here" scores. said: of a word's embedding in the
    stream, whose length is 650 at the last layer.
    """

    match: float = 16.0
    sink: float = 0.3
    said: float = 500.0


@dataclass
class Moments:
    """Of hidden states (after a block's norm) over text: sums, by block.

    first: (D,). second: (D, D). words: (D, D), with the embedding of the word just said. count: of tokens.
    sizes: median length of the stream before the norm.
    """

    first: dict[int, Tensor]
    second: dict[int, Tensor]
    words: dict[int, Tensor]
    sizes: dict[int, float]
    count: int = 0


@torch.no_grad()
def moments(text: Any, tokenizer: Any, embeddings: Tensor, blocks: Sequence[int], tokens: int, seed: int) -> Moments:
    """Runs the text model over chats about lists of words, and over single words drawn from its vocabulary."""
    width = embeddings.shape[1]
    found = Moments(
        {block: torch.zeros(width, dtype=torch.float64) for block in blocks},
        {block: torch.zeros(width, width, dtype=torch.float64) for block in blocks},
        {block: torch.zeros(width, width, dtype=torch.float64) for block in blocks},
        {},
    )
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(block: int) -> Any:
        return lambda module, given, output: states.__setitem__(block, (given[0].float(), output.float()))

    hooks = [text.model.layers[block].input_layernorm.register_forward_hook(keep(block)) for block in blocks]
    try:
        for ids in _texts(tokenizer, seed):
            text.model(input_ids=ids, use_cache=False)
            said = embeddings[ids[:, 1:].flatten()]  # the first token's state is far larger than all others
            for block in blocks:
                stream, normed = (part[:, 1:].flatten(0, 1) for part in states[block])
                found.first[block] += normed.double().sum(0)
                found.second[block] += (normed.T @ normed).double()
                found.words[block] += (normed.T @ said).double()
                found.sizes.setdefault(block, stream.norm(dim=-1).median().item())
            found.count += len(said)
            if found.count >= tokens:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _texts(tokenizer: Any, seed: int, rows: int = 4, length: int = 72) -> Iterator[Tensor]:
    """int64 (rows, length): half of it words as they stand on pages, half single tokens of plain text."""
    words = Words("train")
    said = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    plain = [number for number, text in enumerate(said) if text.strip() and text.isascii() and text.isprintable()]
    rng = np.random.default_rng(seed)
    while True:
        made = []
        for _ in range(rows):
            text = " ".join(words.styled(rng) for _ in range(int(rng.integers(1, 12))))
            chat = f"<|im_start|>user\nWhat does it say?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"
            ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
            made.append([*ids, *rng.choice(plain, length).tolist()][:length])
        yield torch.tensor(made)


class Slots(nn.Module):
    """From an encoder's words and places to an image token of the text model: each slot on axes of its own.

    Axes are directions in which text varies little, so that keys of pictures and of text are told apart.

    Args:
        axes: (D, D), orthonormal rows, the calmest first.
        sizes: widths of the slots' codes.
    """

    def __init__(self, axes: Tensor, sizes: Sequence[int]) -> None:
        super().__init__()
        starts = np.cumsum((0, *sizes)).tolist()
        self.spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.written = sum(sizes)
        projection = word_projection(len(axes), sizes[0]).T
        # from an embedding to its code
        self.maps = [projection[:size] * (sizes[0] / size) ** 0.5 for size in sizes]
        self.axes = axes

    def forward(self, tokens: Tensor, grids: Any) -> Tensor:
        """tokens: (N, written + P): codes of words, then the place. Returns (N, D). Stands for the projector."""
        image = torch.zeros(len(tokens), len(self.axes))
        image[:, : self.written] = tokens[:, : self.written]
        places = tokens[:, self.written :] * PLACED
        image[:, self.written : self.written + places.shape[1]] = places
        image[:, -5] = CONSTANT
        return image @ self.axes

    @torch.no_grad()
    def into(self, projector: Any, tokens: Tensor) -> None:
        """Makes a projector the same linear map of an encoder's tokens; what is between words and places does nothing.

        tokens: (M, d_v) of the encoder, in which text begins: the projector's norm keeps their scale.
        """
        projector.norm.weight.fill_(tokens.std(dim=1, unbiased=False).median().item())
        projector.norm.bias.fill_(tokens.mean(dim=1).median().item())
        width, inputs, places = len(self.axes), tokens.shape[1], 4 * WAVES
        image, constant = torch.zeros(width, projector.up.in_features), torch.zeros(width)
        image[: self.written, : self.written] = torch.eye(self.written)
        image[self.written : self.written + places, inputs - places : inputs] = torch.eye(places) * PLACED
        constant[-5] = CONSTANT
        projector.up.weight.copy_(image)
        projector.up.bias.copy_(constant + LINEAR)
        projector.down.weight.copy_(self.axes.T)
        projector.down.bias.copy_(-LINEAR * self.axes.sum(0))


def orthonormal(count: int, size: int, random: torch.Generator) -> Tensor:
    """(count, size), rows where count <= size."""
    return torch.linalg.qr(torch.randn(size, count, generator=random))[0].T


def calm_axes(seen: Moments, gains: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """(D, D) directions, those in which text varies least first, its mean last; and means before the gain, by block."""
    means = {block: (seen.first[block] / seen.count).float() / gain for block, gain in gains.items()}
    spread = torch.stack(
        [(seen.second[block] / seen.count).float() / gain[:, None] / gain[None] for block, gain in gains.items()]
    ).mean(0)
    common = torch.linalg.svd(torch.stack(list(means.values())), full_matrices=False)[2][:4]
    rest = torch.eye(len(spread)) - common.T @ common
    return torch.linalg.eigh(rest @ spread @ rest + 1e6 * common.T @ common)[1].T.contiguous(), means


@torch.no_grad()
def set_layers(
    model: Any, seen: Moments, slots: Slots, means: dict[int, Tensor], length: float, strengths: Strengths | None = None
) -> None:
    """Sets queries, keys, values and outputs of an adapted model's CASA layers.

    Args:
        model: a Llama-family model in float32, three query heads to a key head.
        seen: of its text model.
        slots: where an image token keeps which word.
        means: of text, by block, before the norm's gain.
        length: of an image token (root mean square) in which text begins.
    """
    strengths = strengths or Strengths()
    random = torch.Generator().manual_seed(5)
    width = len(slots.axes)
    bases = [orthonormal(width, width, random) for _ in range(BEGUN)]
    head_gain = model.decoder.stack.norm.weight.detach().float()
    for number, block in enumerate(seen.first):
        layer = model.casa_layers[str(block)]
        gain = model.decoder.blocks[block].input_layernorm.weight.detach().float()
        size = layer.head_dim
        queries, keys, values = (
            getattr(layer, name).weight.unflatten(0, (-1, size)) for name in ("q_proj", "k_proj", "v_proj")
        )
        output = layer.o_proj.weight.unflatten(1, (-1, size))
        for part in (queries, keys, values, output):
            part.zero_()
        root = size**0.5
        group = len(queries) // len(keys)
        second, words = seen.second[block], seen.words[block]
        said = torch.linalg.solve(second + 1e-3 * second.diagonal().mean() * torch.eye(width), words)
        said = (said / ((said * words).sum() / seen.count)).float()  # (D, D): its product with the truth is 1
        mean = means[block]
        nothing = mean / mean.square().sum() / gain * (root * strengths.match * strengths.sink) ** 0.5
        for head in range(BEGUN):
            size_of = len(slots.maps[head])
            mix = orthonormal(len(STILL), size_of, random) * (size_of / len(STILL)) ** 0.5
            keys[head][STILL] = mix @ slots.axes[slots.spans[head]] / gain * length
            keys[head][SINK] = nothing
            asked = range(head * group, (head + 1) * group)
            for query in asked:
                queries[query][STILL] = mix @ slots.maps[head] @ said.T * root * strengths.match
                queries[query][SINK] = nothing
            # each layer carries another 64 directions of an embedding; outputs learn as fast as the stream is long
            begun = slots.maps[head + 1]
            part = bases[head][size * (number % (width // size)) :][:size] @ begun.T * (len(begun) / width)
            scale = seen.sizes[block] / width**0.5
            values[head] = part @ slots.axes[slots.spans[head + 1]] / gain * length * scale
            if block in SPEAKING:
                output[:, asked[0]] = strengths.said * torch.linalg.pinv(part @ begun * scale) / head_gain[:, None]
