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

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from casa.attention.ask import Ask
from casa.attention.pick import Pick, zeros_of
from casa.windows import WindowLayout

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Blocks:
    """The kernel's blocks of one layout. A Pick is None where it would hand on all rows as they are."""

    query: Pick | None  # (Q, ...) -> (M, ...)
    key: Pick | None  # rows of images, of text (if attended), of `turned` -> (S, ...)
    value: Pick | None  # rows of images, of text (if attended) -> (S, ...)
    out: Pick | None  # (M, ...) -> (Q, ...), zeros for queries in no block
    query_ends: Tensor  # int32 (B + 1,), from 0: where each block's queries start and stop
    key_ends: Tensor  # int32 (B + 1,)
    most_queries: int
    most_keys: int
    causal: bool
    turned: tuple[tuple[int, int], ...]  # (window, delta as in `casa_attention`) of each turned copy

    def to(self, device: torch.device) -> "Blocks":
        names = ("query", "key", "value", "out", "query_ends", "key_ends")
        return replace(self, **{name: part.to(device) for name in names if (part := getattr(self, name)) is not None})


def refusal(ask: Ask) -> str | None:
    """Why the kernel cannot do what is asked, with the remedy; None if it can."""
    if ask.device.type != "cuda":
        return f"varlen is a CUDA kernel and the tensors are on {ask.device.type}; use impl='sdpa'."
    if ask.dtype not in DTYPES:
        return f"varlen takes float16 and bfloat16, not {ask.dtype}; use impl='sdpa', or convert the model."
    if ask.width % 8 or ask.width > 256:
        return f"varlen takes heads of 8, 16, 24, ... 256 channels, not {ask.width}; use impl='sdpa'."
    if _capability(ask.device) < (8, 0):
        return "varlen needs a GPU of compute capability 8.0 or newer; use impl='sdpa'."
    return None


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
    """See `casa_attention`. No second derivatives: the kernel has none."""
    turning = turn is not None and layout.history != 0
    device = query.device
    made = ("varlen", attend, turning, device)
    blocks = layout.cached(made, lambda: _on(device, make_blocks(layout, attend, turning)))
    if blocks is None:
        return zeros_of(query)
    keys, values = [image_key], [image_value]
    if attend == "both":
        keys, values = [image_key, text_key], [image_value, text_value]
    if turn is not None and blocks.turned:
        images = image_key.split([window.num_image for window in layout.windows])
        keys += [turn(images[other], delta) for other, delta in blocks.turned]
    q, k, v = (
        _picked(pick, rows[0] if len(rows) == 1 else torch.cat(rows))
        for pick, rows in ((blocks.query, [query]), (blocks.key, keys), (blocks.value, values))
    )
    out = kernel(
        q,
        k,
        v,
        blocks.query_ends,
        blocks.key_ends,
        blocks.most_queries,
        blocks.most_keys,
        causal=blocks.causal,
        scale=scale,
    )
    return out if blocks.out is None else blocks.out(out)


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """(M, Hq, D), two of (S, Hkv, D) -> (M, Hq, D): the only line here that needs CUDA.

    causal: query i of a block of q queries and s keys sees its keys 0 .. i + s - q; else it sees all s.
    """
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # keywords vary with torch's version
    # torch 2.11 hands fewer key heads to its kernel without being told; from 2.12 on it wants to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
    # (-1, 0) turns on the kernel's causal mask, whose diagonal it shifts by keys - queries: bottom-right. (torch
    # also has a cuDNN path with a diagonal from the top left; in 2.11 to 2.13 it is switched off.)
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(
        query,
        key,
        value,
        query_ends,
        key_ends,
        most_queries,
        most_keys,
        scale=scale,
        window_size=window,
        **grouped,
    )


def make_blocks(layout: WindowLayout, attend: str, turning: bool) -> Blocks | None:
    """The blocks of a layout, on the CPU; None if no text sees anything. turning: `turn` is wanted."""
    text_rows = layout.num_text if attend == "both" else 0
    packed = rows = layout.num_image + text_rows
    queries, keys, values = _Rows(), _Rows(), _Rows()
    turned: list[tuple[int, int]] = []
    row = 0
    for number, window in enumerate(layout.windows):
        earlier = [layout.windows[other] for other in layout.visible_windows(number)[:-1]]
        start = row - window.query_start  # from a packed text index of this window to its query row
        row += window.num_query
        if not window.num_query:
            continue
        # rows of images of earlier windows, as keys; their values are where they always are
        seen_keys = [(other.image_start, other.image_stop) for other in earlier]
        if turning:
            for place, other in enumerate(earlier):
                if other.num_image:
                    turned.append((layout.visible_windows(number)[place], other.text_start - window.text_start))
                    seen_keys[place] = (rows, rows + other.num_image)
                    rows += other.num_image
        between = {i.text_position for i in window.images if window.query_start < i.text_position < window.text_stop}
        for first, stop in pairwise([window.query_start, *sorted(between), window.text_stop]):
            image_stop = max((i.stop for i in window.images if i.text_position <= first), default=window.image_start)
            own = [(window.image_start, image_stop)]
            if text_rows:
                own.append((layout.num_image + window.text_start, layout.num_image + stop))
            if values.block([*((other.image_start, other.image_stop) for other in earlier), *own]):
                keys.block([*seen_keys, *own])
                queries.block([(start + first, start + stop)])
    if not queries.lengths:
        return None
    index = queries.index()
    blank = torch.ones(layout.num_query, dtype=torch.bool)
    blank[index] = False
    back = torch.zeros(layout.num_query, dtype=torch.int64)
    back[index] = torch.arange(len(index))
    most = max(queries.lengths)
    return Blocks(
        query=queries.pick(layout.num_query),
        key=keys.pick(rows),
        value=values.pick(packed),
        out=Pick.of(back, ~blank, len(index), blank.nonzero().squeeze(1)) if blank.any() else None,
        query_ends=queries.ends(),
        key_ends=keys.ends(),
        most_queries=most,
        most_keys=max(keys.lengths),
        # the last query sees every key: with one query per block a mask would only cost the kernel its decode path
        causal=attend == "both" and most > 1,
        turned=tuple(turned),
    )


class _Rows:
    """Source rows block by block, in the order in which the kernel wants them."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.lengths: list[int] = []

    def block(self, spans: list[tuple[int, int]]) -> int:
        """Add rows start:stop of each span as one block, if there are any; how many there are."""
        length = sum(stop - start for start, stop in spans)
        if length:
            self.pieces += [torch.arange(start, stop) for start, stop in spans]
            self.lengths.append(length)
        return length

    def index(self) -> Tensor:
        return torch.cat(self.pieces)

    def ends(self) -> Tensor:
        return torch.tensor(list(accumulate(self.lengths, initial=0)), dtype=torch.int32)

    def pick(self, sources: int) -> Pick | None:
        index = self.index()
        if torch.equal(index, torch.arange(sources)):
            return None
        return Pick.of(index, torch.ones(len(index), dtype=torch.bool), sources)


def _picked(pick: Pick | None, rows: Tensor) -> Tensor:
    """The kernel wants the channels of a head side by side; a packed view may have them otherwise."""
    picked = rows if pick is None else pick(rows)
    return picked if picked.stride(-1) == 1 else picked.contiguous()


def _on(device: torch.device, blocks: Blocks | None) -> Blocks | None:
    return None if blocks is None else blocks.to(device)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
