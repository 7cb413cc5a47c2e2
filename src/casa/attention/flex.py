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
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)
    if attend == "image":
        out = torch.where(layout.on(device, "sees_image")[:, None, None], out, out.new_zeros(()))
    return out


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # shapes change with every batch; one dynamic kernel serves them all
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(layout: WindowLayout, attend: str, device: torch.device):
    """The layout's mask by blocks, computed by rule, never as a dense (Q, N + T) tensor."""
    from torch.nn.attention.flex_attention import create_block_mask

    text = attend == "both"
    # Every key has a window and stands before a text token; a text token stands before itself.
    # Queries see text of their own window, and images from the first window visible to them on.
    index = torch.arange(layout.num_text)
    window = torch.cat([layout.image_window, layout.text_window] if text else [layout.image_window]).to(
        device
    )
    stands = torch.cat([layout.image_text_index, index] if text else [layout.image_text_index]).to(device)
    token = layout.on(device, "query_index")
    latest = layout.text_window[layout.query_index].to(device)
    oldest = layout.first_visible[layout.text_window[layout.query_index]].to(device)
    images = layout.num_image

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = torch.where(key < images, oldest[query], latest[query])
        inside = (window[key] >= first) & (window[key] <= latest[query])
        return inside & (stands[key] <= token[query])

    return create_block_mask(sees, None, None, layout.num_query, len(window), device=str(device))
