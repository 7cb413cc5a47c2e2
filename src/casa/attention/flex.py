"""CASA attention through FlexAttention: one compiled kernel that skips the blocks no window touches.

Shapes as in dispatch.py; keys and values are images then text, N + T of them. Compiling needs a C++ compiler
on a CPU and Triton on a GPU. On a CPU torch (2.13) has no backward for it.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from casa.windows import WindowLayout


def attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    layout: WindowLayout,
    *,
    scale: float,
    attend: str,
    turn: Callable[[Tensor, int], Tensor] | None,
) -> Tensor:
    """See `casa_attention`. Refuses gradients on a CPU, and `turn` with history: a key has one angle here."""
    given = (query, text_key, text_value, image_key, image_value)
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ValueError("flex has no backward on CPU; use impl='sdpa', or torch.no_grad() for forward only.")
    if turn is not None and layout.history:
        raise ValueError("flex cannot turn the keys of earlier windows (history); use impl='sdpa'.")
    if attend == "both":
        key, value = torch.cat([image_key, text_key]), torch.cat([image_value, text_value])
    else:
        key, value = image_key, image_value
    if not len(query) or not len(key):
        return query.masked_fill(torch.ones((), dtype=torch.bool, device=query.device), 0.0)

    device = query.device
    mask = layout.cached(("flex", attend, device), lambda: _block_mask(layout, attend, device))
    q, k, v = (_padded(x).transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    out = out[0].transpose(0, 1)[: len(query)]
    if attend == "image":
        out = torch.where(layout.on(device, "sees_image")[:, None, None], out, out.new_zeros(()))
    return out


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # Not dynamic: torch 2.13 then generates C++ that does not compile. One kernel per padded size instead; where
    # torch gives up on compiling ever more of them, fullgraph makes it say so rather than run a dense mask.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _size(length: int) -> int:
    """A power of two from 128 on, so that there are few sizes to compile; empty blocks cost nothing."""
    return max(128, 1 << (length - 1).bit_length())


def _padded(x: Tensor, fill: float = 0) -> Tensor:
    """(n, ...) -> (_size(n), ...)"""
    return torch.cat([x, x.new_full((_size(len(x)) - len(x), *x.shape[1:]), fill)])


def _block_mask(layout: WindowLayout, attend: str, device: torch.device):
    """The layout's mask by blocks, computed by rule from a few numbers per token."""
    from torch.nn.attention.flex_attention import create_block_mask

    # Every key has a window and stands before a text token; a text token stands before itself.
    # Queries see text of their own window, and images from the first window visible to them on.
    query, mine = layout.query_index, layout.text_window[layout.query_index]
    window, stands = layout.image_window, layout.image_text_index
    is_image = torch.ones(layout.num_image, dtype=torch.bool)
    if attend == "both":
        window = torch.cat([window, layout.text_window])
        stands = torch.cat([stands, torch.arange(layout.num_text)])
        is_image = torch.cat([is_image, torch.zeros(layout.num_text, dtype=torch.bool)])
    # padding lies in windows that do not exist, another for queries than for keys
    token, latest, oldest = (_padded(x, -2).to(device) for x in (query, mine, layout.first_visible[mine]))
    window, stands, is_image = (_padded(x, fill).to(device) for x, fill in ((window, -1), (stands, 0), (is_image, 0)))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = torch.where(is_image[key], oldest[query], latest[query])
        inside = (window[key] >= first) & (window[key] <= latest[query])
        return inside & (stands[key] <= token[query])

    return create_block_mask(sees, None, None, len(token), len(window), device=str(device))
