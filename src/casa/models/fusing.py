"""Puts CASA layers into a text model's blocks without renaming or wrapping a single weight.

Hooks and one extra forward argument do it: the model passes a `casa_step` down through its blocks, and at
each fused block a hook finds there the geometry of the call and its layer. A call without a step leaves the
backbone as it was. Hooks hold no references, so that a deep copy of the model works by itself.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.layers import Step, casa_update

STEP = "casa_step"
FUSED = "casa_fused"  # marks a block that has its layer


class FusedStep:
    """A step with the layers that take it: layer number n belongs to the n-th fused block."""

    def __init__(self, step: Step, layers: list[nn.Module | None]) -> None:
        self.step = step
        self.layers = layers

    @torch.compiler.disable(reason="every call has windows of its own, each of which would be compiled anew")
    def update(self, number: int, attention: nn.Module, hidden: Tensor, replaces: bool = False) -> Tensor:
        """The update by layer `number`, which borrows the block's `attention` if it has no weights of its own."""
        layer = self.layers[number]
        if layer is None:
            return casa_update(attention, hidden, self.step, number, replaces=replaces)
        return layer(hidden, self.step, number)


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
