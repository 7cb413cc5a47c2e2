"""What fusion begins with, in closed form: codes of words, and where image tokens keep them.

SmolLM2 stays frozen, and has to be told word by word what a picture says. An image token tells which words begin in it,
which three stand before these, and by what its text may be asked for (`casa.vision.page_words`). Words are told by
codes: numbers that hidden states of the text model foretell, those foretold best first. What looks for them and says
them is learned (`pretraining.py`).

Shapes: D width of the text model (576), V words, W numbers of a code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casa import FusionConfig
from casa.vision.page_encoder import WAVES
from casa.vision.page_words import TAGS

LAYERS = tuple(range(2, 30, 3))
FUSION = FusionConfig.parallel(layers=LAYERS, output="zero", projector="linear")
LARGEST = 2.5  # of a code's numbers, beside those of a random one: no number says a word alone
PLACED = 0.1  # length of a place's waves, beside words of length 1
TAGGED = 0.6  # of tags: of what is written there, it is the least certain
CONSTANT = 2.0  # of an image token, on the calmest axis: what tells it from text, and keeps its length


@dataclass
class Moments:
    """Of hidden states (after a block's norm) over text: sums, by block.

    first: (D,). second: (D, D). told: (D, T), with what a state is of (`codes`). among: (T, T), of what is told with
    itself. count: of tokens.
    """

    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    told: dict[int, Tensor] = field(default_factory=dict)
    among: Tensor | float = 0.0
    count: int = 0

    def solved(self, block: int) -> Tensor:
        """(D, T) float64: least squares, from a hidden state to its word's code."""
        second = self.second[block]
        ridge = 1e-4 * second.diagonal().mean() * torch.eye(len(second))
        return torch.linalg.solve(second + ridge, self.told[block])


@torch.no_grad()
def moments(model: Any, texts: Iterable[Tensor], codes: Tensor, blocks: Sequence[int]) -> Moments:
    """Runs a text model over texts (B, L), and counts them from the fifth token on.

    The first one's state is far larger than all others. codes: (V, T).
    """
    found = Moments()
    states: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        return lambda module, given, output: states.__setitem__(block, output.float())

    hooks = [model.decoder.blocks[block].input_layernorm.register_forward_hook(keep(block)) for block in blocks]
    try:
        for ids in texts:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            targets = codes[ids[:, 4:]].flatten(0, 1)
            found.among = found.among + (targets.T @ targets).double()
            for block in blocks:
                normed = states[block][:, 4:].flatten(0, 1)
                for sums, value in (
                    (found.first, normed.double().sum(0)),
                    (found.second, (normed.T @ normed).double()),
                    (found.told, (normed.T @ targets).double()),
                ):
                    sums[block] = sums[block] + value if block in sums else value
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


def calm_axes(model: Any, texts: Sequence[Tensor], blocks: Sequence[int] = LAYERS) -> Tensor:
    """(D, D) orthonormal directions, those first in which text varies least before the norms' gains of some blocks.

    What all blocks' hidden states have in common, four directions of their means, comes last. texts: (B, L) each.
    """
    gains = {block: model.decoder.blocks[block].input_layernorm.weight.detach().float() for block in blocks}
    seen = moments(model, texts, torch.zeros(model.config.get_text_config().vocab_size, 1), blocks)
    means = torch.stack([(seen.first[block] / seen.count).float() / gain for block, gain in gains.items()])
    common = torch.linalg.svd(means, full_matrices=False)[2][:4].double()
    varied = torch.stack(
        [(seen.second[block] / seen.count).float() / gain[:, None] / gain[None] for block, gain in gains.items()]
    ).mean(0)
    rest = torch.eye(len(varied)) - common.T @ common
    within = rest @ varied.double() @ rest
    return torch.linalg.eigh(within + 10 * within.trace() * common.T @ common)[1].T.float().contiguous()
