"""The queries and keys of a text model's own self-attention, handed out while it runs.

Shapes: B rows, S tokens, Hq query heads, Hkv key heads, D channels of a head.

Inside `watch_self_attention` each self-attention takes a way of ours through transformers' choice of implementations.
It hands out what it was given, and attends as it would have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from casa.errors import UserError
from casa.models.backbones import Decoder

NAME = "casa_watched"  # among transformers' implementations of attention
WATCHED = "casa_watch"  # the argument that is passed down to it

SelfAttentionRecorder = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""(block, query (B, Hq, S, D), key (B, Hkv, S, D), mask, scale): on the CPU, rotary applied. mask: bool (S, S) of the
first row, True where a query sees a key."""


@contextmanager
def watch_self_attention(decoder: Decoder, record: SelfAttentionRecorder) -> Iterator[None]:
    """Calls `record` from every block's self-attention that runs inside the `with`, in calls without a cache.

    Blocks whose self-attention fusion replaced have none to watch. Raises UserError where the model attends otherwise
    than through torch.
    """
    plain = str(decoder.stack.config._attn_implementation)  # type: ignore[union-attr]
    if plain not in ("sdpa", "eager"):
        raise UserError(f"self-attention cannot be watched under attn_implementation={plain!r}; load it with 'sdpa'.")
    handles = []
    for number, block in enumerate(decoder.blocks):
        attention = block.get_submodule("self_attn")
        enter = partial(_enter, lambda *given, number=number: record(number, *given))
        handles.append(attention.register_forward_pre_hook(enter, with_kwargs=True))
        # a forward that fails leaves the config as it was, too
        handles.append(attention.register_forward_hook(partial(_leave, plain), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(tell: Callable[..., None], attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    attention.config._attn_implementation = NAME
    return args, {**kwargs, WATCHED: tell}


def _leave(plain: str, attention: Any, args: tuple, output: Any) -> None:
    attention.config._attn_implementation = plain


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """As torch attends, once the queries and keys were handed out; eager's masks of numbers are taken as well."""
    tell = kwargs.pop(WATCHED)
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attention_mask is not None:
        given = attention_mask[0, 0].cpu()
        seen = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
    scale = kwargs.get("scaling")
    tell(query.detach().cpu(), key.detach().cpu(), seen, query.shape[-1] ** -0.5 if scale is None else scale)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
