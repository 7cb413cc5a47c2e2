"""How CASA layers are put into a text model's blocks, and how its self-attention treats packed rows."""

from collections.abc import Iterable, Set
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from casa.errors import UserError
from casa.layers import Step, casa_update
from casa.models.backbones import Decoder

STEP = "casa_step"
FUSED = "casa_fused"  # marks a block that has its layer


class FusedStep:
    """A step with the layers that take it: layer number n belongs to the n-th fused block."""

    def __init__(self, step: Step, layers: list[nn.Module | None], silent: Set[int] = frozenset()) -> None:
        self.step = step
        self.layers = layers
        self.silent = silent

    @torch.compiler.disable(reason="every call has windows of its own, each of which would be compiled anew")
    def update(self, number: int, attention: nn.Module, hidden: Tensor, replaces: bool = False) -> Tensor:
        """The update by layer `number`, which borrows the block's `attention` if it has no weights of its own.

        Zeros of a layer that is `silent`: it has run all the same, since later calls need its keys and values.
        """
        layer = self.layers[number]
        if layer is None:
            found = casa_update(attention, hidden, self.step, number, replaces=replaces)
        else:
            found = layer(hidden, self.step, number)
        return torch.zeros_like(found) if number in self.silent else found


def fuse(blocks: nn.ModuleList, chosen: tuple[int, ...], placement: str, post_norm: str | None = None) -> None:
    """Attaches layer number n to block `chosen[n]`. post_norm: the block's norm over attention, if it has one.

    Raises UserError for blocks that have such layers already: the layers of two models would both be at work in either.
    """
    if any(getattr(block, FUSED, False) for block in blocks):
        raise UserError("this backbone has fusion layers already, of another model; load it once more.")
    for number, index in enumerate(chosen):
        block = blocks[index]
        attention = block.get_submodule("self_attn")
        setattr(block, FUSED, True)
        if placement == "parallel":
            attention.register_forward_hook(partial(_beside, number), with_kwargs=True)
        elif placement == "before":
            block.register_forward_pre_hook(partial(_ahead, number, post_norm), with_kwargs=True)
        else:
            attention.__class__ = _replaced(type(attention))
            attention.casa_number = number  # type: ignore[assignment]


def _beside(number: int, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """CASA⊕: h = norm(x); x + SA(h) + CASA(h). A norm behind attention sees the sum."""
    step: FusedStep | None = kwargs.get(STEP)
    if step is None:
        return output
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return (output[0] + step.update(number, attention, hidden), *output[1:])


def _ahead(number: int, post_norm: str | None, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """CASA→: x = x + CASA(norm(x)), then the block."""
    step: FusedStep | None = kwargs.get(STEP)
    if step is None:
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    normed = block.get_submodule("input_layernorm")(hidden)
    update = step.update(number, block.get_submodule("self_attn"), normed)
    hidden = hidden + (update if post_norm is None else block.get_submodule(post_norm)(update))
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


class ReplacedSelfAttention(nn.Module):
    """CASA∨: a self-attention that looks at its window instead of the whole text, with the same weights."""

    casa_number: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        # its class is made as the model is, so a pickle names the class that it was made from
        return _unpickled, (type(self).__bases__[1],), self.__dict__

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        step: FusedStep | None = kwargs.get(STEP)
        if step is None:
            raise RuntimeError("this block's self-attention was replaced; call the CASA model, not its backbone")
        return step.update(self.casa_number, self, hidden_states, replaces=True), None


@cache
def _replaced(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a family's self-attention, made to look at its window."""
    return type(f"Replaced{kind.__name__}", (ReplacedSelfAttention, kind), {})


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(_replaced(kind))


def is_own_hook(hook: Any) -> bool:
    """Whether a block or a self-attention has this hook from here."""
    return getattr(hook, "func", hook) in (_beside, _ahead, _enter, _leave)


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
