"""Where layers look while all of them learn what to say: what `finding.py` teaches one by one, on samples ever new.

Of a batch as the whole model sees it, each picture is a row with the text from there on, up to the next picture. So the
loss of a layer's role holds in chats and in sessions of frames, too; it reaches the layers below by hidden states.

Shapes: B rows of a batch, P pictures, N image tokens of all; of one picture L text tokens from it on, M image tokens, K
answer tokens; D width of the text model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from projects.casa_smol.finding import Rows, attention, even, loss_of
from projects.casa_smol.perfect_pages import Batch


@dataclass(frozen=True)
class Places:
    """Where the parts of a batch's `Rows` lie.

    text, image: int64 (P, L) and (P, M), in the batch's text, all of its rows one after the other, and in all of its
    image tokens. is_image, at, said, told, is_first: as `Rows` has them.
    """

    text: Tensor
    image: Tensor
    is_image: Tensor
    at: Tensor
    said: Tensor
    told: Tensor
    is_first: Tensor

    def rows(self, text: Tensor, image: Tensor) -> Rows:
        """Of one block. text: (B, length, D) behind its norm. image: (N, D), of root mean square 1."""
        text, wanted = text.flatten(0, 1)[self.text], torch.zeros_like(self.text, dtype=torch.bool)
        return Rows(text, image[self.image], self.is_image, self.at, self.said, self.told, self.is_first, wanted)


def places_of(batch: Batch) -> Places:
    """Finds a batch's pictures, and the answer tokens behind each."""
    positions, sizes = batch.inputs["image_positions"], batch.inputs["image_grid_thw"].prod(1)
    rows, begins = positions.T
    length = batch.labels.shape[1]
    is_last = nn.functional.pad(rows[1:] != rows[:-1], (0, 1), value=True)
    ends = torch.where(is_last, length, begins.roll(-1))
    text = begins[:, None] + torch.arange(int((ends - begins).max()))
    is_mine = text < ends[:, None]
    text = rows[:, None] * length + text.clamp(max=length - 1)
    image, firsts = torch.arange(int(sizes.max())).expand(len(sizes), -1), sizes.cumsum(0) - sizes
    is_image = image < sizes[:, None]
    image = torch.where(is_image, image + firsts[:, None], 0)
    following = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
    says = (following.flatten()[text] >= 0) & is_mine
    # answer tokens first, in order
    at = says.int().argsort(dim=1, descending=True, stable=True)[:, : int(says.sum(1).max())]
    is_said = says.gather(1, at)
    query = text.gather(1, at)
    told = torch.where(is_said, -1, -2)[..., None].repeat(1, 1, 3)
    _, column, token, slot = batch.where.T.contiguous()
    picture = torch.searchsorted(firsts, token, right=True) - 1
    place = (at[picture] == (column - begins[picture])[:, None]).int().argmax(1)
    told[picture, place, slot] = token - firsts[picture]
    is_first = is_said & (batch.labels.flatten()[query] < 0)
    return Places(text, image, is_image, at, following.flatten()[query], told, is_first)


def look(
    model: Any, roles: Mapping[int, str], states: Sequence[Tensor], image: Tensor, batch: Batch
) -> tuple[Tensor, dict[int, float]]:
    """How far layers are from looking where the next word stands (nats, their sum), and what share each has found.

    Args:
        model: The fused model.
        roles: By block; none is "asked".
        states: (B, length, D) of the text before each block.
        image: (N, D), all image tokens, before a block's norm.
        batch: What the model has seen.
    """
    places, total, found = places_of(batch), torch.zeros(()), dict[int, float]()
    image = even(image.float())
    for block, role in roles.items():
        norm = model.decoder.blocks[block].input_layernorm
        rows = places.rows(norm(states[block]), image)
        with torch.autocast("cpu", torch.bfloat16):
            shares = attention(model.casa_layers[str(block)], rows, norm.weight)
        missed, found[block] = loss_of(role)(shares.float(), rows)
        total = total + missed
    return total, found
