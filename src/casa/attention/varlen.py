"""CASA attention through torch's own variable-length kernel (`torch.nn.attention.varlen`), on CUDA.

Shapes: B blocks, M = all their queries, S = all their keys; the rest as in dispatch.py.

The kernel takes blocks of queries, each with keys of its own, and knows one mask: causal, aligned bottom-right,
so that the last query of a block sees its last key (paper, "FlashAttention"). A window whose images stand at its
start is one such block. Where an image stands between the queries of a window, the queries behind it are a block
of their own, and so every layout is exact; the price is that the keys in front are copied once more:

      image A before t0, B before t2, one window         block 0          block 1
                                                         A A t0 t1        A A B t0 t1 t2 t3
                                                    t0   # # #  .    t2   # # # #  #  #  .
                                                    t1   # # #  #    t3   # # # #  #  #  #

Keys of a block: images of earlier visible windows, the window's images in front of the block, then the window's
text up to the block's last query. Images that stand behind all text are in no block.
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from casa.attention.common import AttentionInputs, AttentionRequest, RowGather, RowList, joined, zeros_of
from casa.windows import WindowLayout

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class VarlenBlocks:
    """The kernel's blocks of one layout. A RowGather is None where it would hand on all rows as they are."""

    query: RowGather | None  # (Q, ...) -> (M, ...)
    key: RowGather | None  # rows of images, of text (if attended), of `turned` -> (S, ...)
    value: RowGather | None  # rows of images, of text (if attended) -> (S, ...)
    out: RowGather | None  # (M, ...) -> (Q, ...), zeros for queries in no block
    query_ends: Tensor  # int32 (B + 1,), from 0: where each block's queries start and stop
    key_ends: Tensor  # int32 (B + 1,)
    max_queries: int
    max_keys: int
    causal: bool  # query i of a block of q queries and s keys sees its keys 0 .. i + s - q; else it sees all s
    turned: tuple[tuple[int, int], ...]  # (window, delta as in `casa_attention`) of each turned copy

    def to(self, device: torch.device) -> "VarlenBlocks":
        names = ("query", "key", "value", "out", "query_ends", "key_ends")
        return replace(self, **{name: part.to(device) for name in names if (part := getattr(self, name)) is not None})


def refusal(request: AttentionRequest) -> str | None:
    """Why the kernel cannot do what is asked, with the remedy; None if it can."""
    if request.device.type != "cuda":
        return f"varlen is a CUDA kernel and the tensors are on {request.device.type}; use impl='sdpa'."
    if request.dtype not in DTYPES:
        return f"varlen takes float16 and bfloat16, not {request.dtype}; use impl='sdpa', or convert the model."
    if request.width % 8 or request.width > 256:
        return f"varlen takes heads of 8, 16, 24, ... 256 channels, not {request.width}; use impl='sdpa'."
    if _capability(request.device) < (8, 0):
        return "varlen needs a GPU of compute capability 8.0 or newer; use impl='sdpa'."
    return None


def attention(inputs: AttentionInputs) -> Tensor:
    """See `casa_attention`. No second derivatives: the kernel has none."""
    what, device = (inputs.attend, inputs.turning), inputs.query.device
    blocks = inputs.layout.cached(("varlen", *what, device), lambda: make_blocks(inputs.layout, *what, device))
    if blocks is None:
        return zeros_of(inputs.query)
    keys = [*inputs.keys, *inputs.turned_keys(blocks.turned)]
    query = _gathered(blocks.query, [inputs.query])
    out = kernel(query, _gathered(blocks.key, keys), _gathered(blocks.value, inputs.values), blocks, inputs.scale)
    return out if blocks.out is None else blocks.out(out)


def kernel(query: Tensor, key: Tensor, value: Tensor, blocks: VarlenBlocks, scale: float) -> Tensor:
    """(M, Hq, D), two of (S, Hkv, D) -> (M, Hq, D): the only lines here that need CUDA."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # keywords vary with torch's version
    # torch 2.11 hands fewer key heads to its kernel without being told; from 2.12 on it wants to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
    # (-1, 0) turns on the kernel's causal mask, whose diagonal it shifts by keys - queries: bottom-right. (torch
    # also has a cuDNN path with a diagonal from the top left; in 2.11 to 2.13 it is switched off.)
    window = (-1, 0) if blocks.causal else (-1, -1)
    ends = blocks.query_ends, blocks.key_ends, blocks.max_queries, blocks.max_keys
    return varlen_attn(query, key, value, *ends, scale=scale, window_size=window, **grouped)


def make_blocks(
    layout: WindowLayout, attend: str, turning: bool, device: torch.device | None = None
) -> VarlenBlocks | None:
    """The blocks of a layout; None if no text sees anything. turning: `turn` is wanted."""
    text_rows = layout.num_text if attend == "both" else 0
    packed = rows = layout.num_image + text_rows
    queries, keys, values = RowList(), RowList(), RowList()
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    turned: list[tuple[int, int]] = []
    row = 0
    for number, window in enumerate(layout.windows):
        start = row - window.query_start  # from a packed text index of this window to its query row
        row += window.num_query
        if not window.num_query:
            continue
        seen_values, seen_keys = [], []
        for other in layout.visible_windows(number)[:-1]:
            earlier = layout.windows[other]
            images = earlier.image_start, earlier.image_stop
            seen_values.append(images)
            if turning and earlier.num_image:
                turned.append((other, earlier.text_start - window.text_start))
                images = rows, rows + earlier.num_image
                rows = images[1]
            seen_keys.append(images)
        between = {i.text_position for i in window.images if window.query_start < i.text_position < window.text_stop}
        for first, stop in pairwise([window.query_start, *sorted(between), window.text_stop]):
            image_stop = max((i.stop for i in window.images if i.text_position <= first), default=window.image_start)
            own = [(window.image_start, image_stop)]
            if text_rows:
                own.append((layout.num_image + window.text_start, layout.num_image + stop))
            if length := sum(b - a for a, b in (*seen_values, *own)):
                values.add(*seen_values, *own)
                keys.add(*seen_keys, *own)
                queries.add((start + first, start + stop))
                key_lengths.append(length)
                query_lengths.append(stop - first)
    if not query_lengths:
        return None
    index = queries.index()
    blank = torch.ones(layout.num_query, dtype=torch.bool)
    blank[index] = False
    back = torch.zeros(layout.num_query, dtype=torch.int64)
    back[index] = torch.arange(len(index))
    blocks = VarlenBlocks(
        query=_gather(queries, layout.num_query),
        key=_gather(keys, rows),
        value=_gather(values, packed),
        out=RowGather.of(back, ~blank, len(index), blank.nonzero().squeeze(1)) if blank.any() else None,
        query_ends=_ends(query_lengths),
        key_ends=_ends(key_lengths),
        max_queries=max(query_lengths),
        max_keys=max(key_lengths),
        # the last query sees every key: with one query per block a mask would only cost the kernel its decode path
        causal=attend == "both" and max(query_lengths) > 1,
        turned=tuple(turned),
    )
    return blocks if device is None else blocks.to(device)


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def _gather(rows: RowList, sources: int) -> RowGather | None:
    return None if torch.equal(rows.index(), torch.arange(sources)) else rows.gather(sources)


def _gathered(gather: RowGather | None, tensors: list[Tensor]) -> Tensor:
    """The kernel wants the channels of a head side by side; a packed view may have them otherwise."""
    rows = joined(tensors) if gather is None else gather(joined(tensors))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
