"""Where layers look while all of them learn what to say: what `finding.py` teaches one by one, on samples ever new.

Of a batch as the whole model sees it, each picture is a row with the text from there on, up to the next picture. So the
loss of a layer's role holds in chats and in sessions of frames, too; it reaches the layers below by hidden states.

Shapes: B rows of a batch, P pictures, N image tokens of all; of one picture L text tokens from it on, M image tokens, K
answer tokens; D width of the text model.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from projects.casa_smol.finding import Rows, attention, even, loss_of
from projects.casa_smol.perfect_pages import Batch


def rows_in(batch: Batch, image: Tensor) -> tuple[Tensor, Callable[[Tensor], Rows]]:
    """Finds a batch's pictures, and the answer tokens behind each.

    Args:
        batch: What the model has seen.
        image: (N, D), of root mean square 1.

    Returns:
        int64 (P, L), where the text behind each picture lies in the batch's, all of whose rows come one after the
        other; and what makes rows of that text's hidden states in a block (P, L, D), behind its norm.
    """
    positions, sizes = batch.inputs["image_positions"], batch.inputs["image_grid_thw"].prod(1)
    rows, begins = positions.T
    length = batch.labels.shape[1]
    is_last = nn.functional.pad(rows[1:] != rows[:-1], (0, 1), value=True)
    ends = torch.where(is_last, length, begins.roll(-1))
    text = begins[:, None] + torch.arange(int((ends - begins).max()))
    is_mine = text < ends[:, None]
    text = rows[:, None] * length + text.clamp(max=length - 1)
    tokens, firsts = torch.arange(int(sizes.max())).expand(len(sizes), -1), sizes.cumsum(0) - sizes
    is_image = tokens < sizes[:, None]
    following = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
    says = (following.flatten()[text] >= 0) & is_mine
    # answer tokens first, in order
    at = says.int().argsort(dim=1, descending=True, stable=True)[:, : int(says.sum(1).max())]
    is_said, query = says.gather(1, at), text.gather(1, at)
    told = torch.where(is_said, -1, -2)[..., None].repeat(1, 1, 3)
    _, column, token, slot = batch.where.T.contiguous()
    picture = torch.searchsorted(firsts, token, right=True) - 1
    place = (at[picture] == (column - begins[picture])[:, None]).int().argmax(1)
    told[picture, place, slot] = token - firsts[picture]
    return text, partial(
        Rows,
        image=image[torch.where(is_image, tokens + firsts[:, None], 0)],
        is_image=is_image,
        at=at,
        said=following.flatten()[query],
        told=told,
        is_first=is_said & (batch.labels.flatten()[query] < 0),
        wanted=torch.zeros_like(is_mine),
    )


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
    (text, rows_of_text), total, found = rows_in(batch, even(image.float())), torch.zeros(()), dict[int, float]()
    for block, role in roles.items():
        norm = model.decoder.blocks[block].input_layernorm
        rows = rows_of_text(norm(states[block]).flatten(0, 1)[text])
        with torch.autocast("cpu", torch.bfloat16):
            shares = attention(model.casa_layers[str(block)], rows, norm.weight)
        missed, found[block] = loss_of(role)(shares.float(), rows)
        total = total + missed
    return total, found
