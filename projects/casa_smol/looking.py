"""Where layers look before an answer: some are told, while all of them learn what to say.

An answer's first word is the hardest to find: no word before it leads there, and what it is found by stands somewhere
in the question. What is said tells a layer little about where it should have looked. So the token before an answer also
learns where to look: in two lower layers one key head's queries at the words that say what is asked for, in two layers
above them all heads at the image token in which the answer begins.

Shapes: B rows of a batch, L text tokens, N image tokens of all pictures, F places to look at, D width of the text
model, C of a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casa.layers import Rotary
from projects.casa_smol.perfect_pages import Batch

ASKERS, LOOKERS = (5, 8), (11, 17)
"""Blocks whose layers are told what is asked for, and where the answer begins."""
ASKING = 1  # key head of the first, whose query heads look at what is asked for


def look(model: Any, states: Sequence[Tensor], image: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """How far layers are from looking where answers begin, of all they see of a picture.

    Args:
        model: The fused model.
        states: (B, L, D) of the text before each block.
        image: (N, D), before a block's norm.
        batch: What the model has seen; some answer's place is known.

    Returns:
        Nats an answer, the layers' sum; and in what share of them the layers' heads look there most.
    """
    row, column, token, begin = batch.begins.T
    is_other, missed, found = _is_other(batch, row, begin), torch.zeros(()), 0.0
    for heads, hidden, seen in _heads(model, LOOKERS, states, image):
        query, key = heads.query(hidden[row, column], column - begin), heads.key(seen)
        scores = torch.einsum("fghc,ngc->fghn", query, key).masked_fill(is_other[:, None, None], -torch.inf)
        shares = scores.softmax(-1).mean((1, 2))
        missed = missed - (shares.gather(1, token[:, None]) + 1e-6).log().mean()
        found += (shares.argmax(1) == token).float().mean().item() / len(LOOKERS)
    return missed, found


def ask(model: Any, states: Sequence[Tensor], image: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """How far layers are from looking at the words that say what is asked for, of all they see.

    Args and returns are those of `look`; nats are of a word, and the share is that of the heads' attention.
    """
    row, column, told, begin = batch.asked.T
    is_other, missed, found = _is_other(batch, row, begin), torch.zeros(()), 0.0
    place = torch.arange(states[0].shape[1]) - begin[:, None]
    is_hidden = (place < 0) | (place > (column - begin)[:, None])
    for heads, hidden, seen in _heads(model, ASKERS, states, image):
        query = heads.query(hidden[row, column], column - begin)[:, ASKING]
        text, picture = heads.key(hidden)[row][..., ASKING, :], heads.key(seen)[:, ASKING]
        scores = [
            torch.einsum("fhc,flc->fhl", query, heads.turned(text, place)).masked_fill(is_hidden[:, None], -torch.inf),
            torch.einsum("fhc,nc->fhn", query, picture).masked_fill(is_other[:, None], -torch.inf),
        ]
        share = torch.cat(scores, -1).softmax(-1).mean(1).gather(1, told[:, None])
        missed = missed - (share + 1e-6).log().mean()
        found += share.mean().item() / len(ASKERS)
    return missed, found


def _is_other(batch: Batch, row: Tensor, begin: Tensor) -> Tensor:
    """bool (F, N): image tokens of other pictures than the one of that row before that column."""
    positions, sizes = batch.inputs["image_positions"], batch.inputs["image_grid_thw"].prod(1)
    mine = (positions == torch.stack([row, begin], 1)[:, None]).all(-1).int().argmax(1)
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes) != mine[:, None]


@dataclass(frozen=True)
class _Heads:
    """A layer's queries, scaled, and keys. Rotary positions are counted from the picture, which is at 0."""

    layer: Any
    rotary: Rotary

    def query(self, hidden: Tensor, place: Tensor) -> Tensor:
        """(F, key heads, query heads of each, C), of hidden states (F, D)."""
        heads = self._of(self.layer.q_proj, hidden) * self.layer.scaling
        groups = self.layer.k_proj.out_features // self.layer.head_dim
        return self.rotary(place)(heads).unflatten(1, (groups, -1))

    def key(self, hidden: Tensor) -> Tensor:
        """(..., key heads, C), not turned yet, of hidden states (..., D)."""
        return self._of(self.layer.k_proj, hidden)

    def turned(self, heads: Tensor, place: Tensor) -> Tensor:
        """Heads (F, L, C), turned by their places (F, L)."""
        return self.rotary(place.flatten())(heads.flatten(0, 1)[:, None]).view_as(heads)

    def _of(self, projection: nn.Module, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return projection(hidden).unflatten(-1, (-1, self.layer.head_dim)).float()


def _heads(
    model: Any, blocks: Sequence[int], states: Sequence[Tensor], image: Tensor
) -> Iterator[tuple[_Heads, Tensor, Tensor]]:
    """Layers, with the text's hidden states (B, L, D) and the image tokens (N, D) as these see them."""
    rotaries = model.decoder.rotaries(blocks, image.device, torch.float32)
    even = nn.functional.rms_norm(image.float(), image.shape[-1:], eps=1e-5)
    for block, rotary in zip(blocks, rotaries, strict=True):
        norm = model.decoder.blocks[block].input_layernorm
        yield _Heads(model.casa_layers[str(block)], rotary), norm(states[block]), even * norm.weight
