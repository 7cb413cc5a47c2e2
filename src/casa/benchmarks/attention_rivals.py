"""What one would write without casa: a dense mask, varlen on concatenated keys (the paper's way), FlexAttention.

Shapes as in `casa_attention`. Each maker takes a layout and a device, does what a layer need not do again, and
returns a function of (query, text_key, text_value, image_key, image_value). The last two are for CUDA and for layouts
whose images open their windows, without history.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.windows import WindowLayout

Rival = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def dense_mask(layout: WindowLayout, device: torch.device) -> Rival:
    """One call over all text and images under a bool mask (Q, N + T)."""
    mask = layout.mask(device)[None, None]

    def run(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        key, value = torch.cat([image_k, text_k]), torch.cat([image_v, text_v])
        grouped = q.shape[1] != key.shape[1]
        if device.type == "cuda" and grouped:
            # CUDA's fused kernel that takes a mask knows no groups; without it the scores of all heads are stored
            key, value = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (key, value))
            grouped = False
        query, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return run


def concatenated_varlen(layout: WindowLayout, device: torch.device) -> Rival:
    """Keys and values concatenated window by window in each call, then torch's variable-length kernel."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # keywords vary with torch's version
    windows = [window for window in layout.windows if window.num_query]
    _need_opening_images(layout)

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)

    queries = [window.num_query for window in windows]
    keys = [window.num_image + window.num_text for window in windows]
    query_ends, key_ends = ends(queries), ends(keys)
    # torch 2.11 takes fewer key heads without being told
    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}

    def joined(image: Tensor, text: Tensor) -> Tensor:
        parts = [
            part
            for window in windows
            for part in (image[window.image_start : window.image_stop], text[window.text_start : window.text_stop])
        ]
        return torch.cat(parts)

    def run(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        key, value = joined(image_k, text_k), joined(image_v, text_v)
        return varlen_attn(q, key, value, query_ends, key_ends, max(queries), max(keys), window_size=(-1, 0), **grouped)

    return run


def flex_attention(layout: WindowLayout, device: torch.device) -> Rival:
    """FlexAttention with a document mask, as its documentation shows: sizes as they are, nothing padded."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    _need_opening_images(layout)
    token = layout.on(device, "query_index")
    mine = layout.on(device, "text_window")[token]
    window = torch.cat([layout.on(device, "image_window"), layout.on(device, "text_window")])
    stands = torch.cat([layout.on(device, "image_text_index"), torch.arange(layout.num_text, device=device)])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (window[key] == mine[query]) & (stands[key] <= token[query])

    mask = create_block_mask(sees, None, None, len(token), len(window), device=str(device))
    compiled = torch.compile(attend, dynamic=False)

    def run(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        key, value = torch.cat([image_k, text_k]), torch.cat([image_v, text_v])
        query, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
        # beyond torch's own bound on sizes it would go on without its kernel, and say nothing
        with config.patch(recompile_limit=64):
            out = compiled(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
        return out[0].transpose(0, 1)

    return run


def _need_opening_images(layout: WindowLayout) -> None:
    opening = all(i.text_position == window.text_start for window in layout.windows for i in window.images)
    if layout.history or not opening:
        raise ValueError("this rival needs images that open their windows, and no history.")


RIVALS: dict[str, Callable[[WindowLayout, torch.device], Rival]] = {
    "dense mask": dense_mask,
    "varlen, concatenated": concatenated_varlen,
    "FlexAttention": flex_attention,
}
