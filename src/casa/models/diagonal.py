"""Self-attention of packed rows, along the diagonal: samples see nothing of each other, so nothing in between is done.

    a a . . . .     the mask of a row, of which transformers' attention through torch computes everything, and which
    a a . . . .     torch keeps as floats for the backward pass, in every block of the model
    . . b b c .
    . . b b c c     here, a few neighbours at a time, with their own part of the same mask

Shapes: B rows, S tokens, H heads, D channels of a head.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from casa.models.backbones import Decoder

NAME = "casa_diagonal"  # among transformers' implementations of attention, which a text model's config chooses from
SPANS = "casa_spans"  # the argument that is passed down through the blocks
SPAN = 256  # tokens up to which neighbours share a call: calls of fewer cost more than what they save


def spans_of(starts: Iterable[int], length: int) -> tuple[int, ...] | None:
    """Lengths of the spans of a row of `length` tokens, for samples that start at `starts`; None if one span is all.

    A span holds whole samples: as many neighbours as fit into `SPAN` tokens, or one that is longer.
    """
    bounds = [0, *sorted(start for start in set(starts) if 0 < start < length), length]
    spans: list[int] = []
    for begin, end in pairwise(bounds):
        if spans and spans[-1] + end - begin <= SPAN:
            spans[-1] += end - begin
        else:
            spans.append(end - begin)
    return tuple(spans) if len(spans) > 1 else None


def passed_down(decoder: Decoder, starts: Iterable[int], length: int) -> dict[str, Any]:
    """The argument for a decoder's stack, in which samples start at `starts` in all rows.

    Each self-attention that gets it goes this way while it runs, in the backward pass too where its block is computed
    again; the config, which names the way, is afterwards what it was. Nothing for a model that attends otherwise than
    through torch.
    """
    if torch.compiler.is_compiling() or decoder.stack.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
        return {}
    spans = spans_of(starts, length)
    if spans is None:
        return {}
    for block in decoder.blocks:
        attention = block.get_submodule("self_attn")
        if not getattr(attention, SPANS, False):
            setattr(attention, SPANS, True)
            attention.register_forward_pre_hook(_enter, with_kwargs=True)
            attention.register_forward_hook(_leave, with_kwargs=True, always_call=True)
    return {SPANS: spans}


def _enter(attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get(SPANS) is not None:
        attention.config._attn_implementation = NAME


def _leave(attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if kwargs.get(SPANS) is not None:
        attention.config._attn_implementation = "sdpa"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention through torch, called once for each span if there are any.

    query, key, value: (B, H, S, D). Gives (B, S, H, D), and no weights.
    """
    plain: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    spans = kwargs.pop(SPANS, None)
    if spans is None or attention_mask is None or attention_mask.shape[-2:] != (sum(spans), sum(spans)):
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    found, start = [], 0
    # one `split` has one concatenation for its backward
    for q, k, v in zip(*(x.split(spans, dim=2) for x in (query, key, value)), strict=True):
        stop = start + q.shape[2]
        mask = attention_mask[..., start:stop, start:stop]
        found.append(plain(module, q, k, v, mask, *args, **kwargs)[0])
        start = stop
    return torch.cat(found, dim=1), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
