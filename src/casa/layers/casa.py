"""The CASA layer: a block's self-attention, copied, with image tokens among its keys and values.

Shapes: B rows, L tokens, d width, Q real tokens, Hq query heads, Hkv key heads, D channels of a head.

Paper, "Mechanism" and "Initialisation": text queries look at the image tokens and the text of their window
in one softmax; the layer starts as a copy of the self-attention of its block; text enters through the block's
own input norm. Plain cross-attention is the same layer with images as its only keys.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from casa.layers.step import Step

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")


class CasaAttention(nn.Module):
    """A CASA layer with weights of its own, made from a block's self-attention module.

    attention: has `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim` and perhaps `q_norm`, `k_norm`; all are
        copied with their biases and dtypes. Raises ValueError if one is missing.
    gate: "tanh" multiplies the output by tanh of a scalar that starts at zero (Flamingo's gate).
    """

    def __init__(self, attention: nn.Module, gate: str | None = None) -> None:
        super().__init__()
        missing = [name for name in (*PROJECTIONS, "head_dim") if not hasattr(attention, name)]
        if missing:
            raise ValueError(f"{type(attention).__name__} has no {', '.join(missing)}: CASA cannot be built from it")
        self.head_dim: int = attention.head_dim  # type: ignore[assignment]
        # of the scores; most backbones use head_dim ** -0.5
        self.scaling: float = getattr(attention, "scaling", None) or self.head_dim**-0.5
        for name in (*PROJECTIONS, *HEAD_NORMS):
            if (module := getattr(attention, name, None)) is not None:
                setattr(self, name, copy.deepcopy(module))
        self.gate = (
            nn.Parameter(cast(nn.Linear, self.get_submodule("o_proj")).weight.new_zeros(1)) if gate == "tanh" else None
        )

    def copy_from(self, attention: nn.Module, *, silent: bool = False) -> None:
        """Takes the weights of a self-attention again, in place; `silent` leaves the output projection at zero."""
        with torch.no_grad():
            for name in (*PROJECTIONS, *HEAD_NORMS):
                if (mine := getattr(self, name, None)) is not None:
                    mine.load_state_dict(getattr(attention, name).state_dict())
            if silent:
                for parameter in self.get_submodule("o_proj").parameters():
                    parameter.zero_()

    def forward(self, hidden: Tensor, step: Step, layer: int) -> Tensor:
        """The update (B, L, d) for normed hidden states (B, L, d); zero for text that sees no image."""
        return casa_update(self, hidden, step, layer, gate=self.gate)


def casa_update(
    weights: nn.Module,
    hidden: Tensor,
    step: Step,
    layer: int,
    *,
    gate: Tensor | None = None,
    replaces: bool = False,
) -> Tensor:
    """What the CASA layer number `layer` gives the text, with projections from `weights`.

    hidden: (B, L, d) after the block's input norm. replaces: the layer stands in for self-attention, so text
    that sees no image still gets its attention to the window's text. Padding gets zeros, and so does text that sees no
    image: whatever its numbers come to, they are nobody's, in the gradients too.
    """
    get = weights.get_submodule
    flat = hidden.flatten(0, -2)
    text = flat if step.tokens is None else flat[step.tokens]
    width: int = weights.head_dim  # type: ignore[assignment]

    def heads(name: str, norm: str | None = None) -> Tensor:
        x = get(name)(text).unflatten(-1, (-1, width))
        module = getattr(weights, norm, None) if norm else None
        return x if module is None else module(x)

    text_is_key = step.attend != "image"
    sees = None if replaces and text_is_key else step.sees_image
    query = heads("q_proj", "q_norm")
    out = step.attention(
        layer,
        # who looks at the weights (`record`) may ask about any text
        query if step.record is not None else _only(sees, query),
        heads("k_proj", "k_norm") if text_is_key else None,
        heads("v_proj") if text_is_key else None,
        getattr(weights, "scaling", None),
    )
    update = _only(sees, get("o_proj")(_only(sees, out).flatten(1)))
    if gate is not None:
        update = update * gate.tanh().to(update.dtype)
    if step.tokens is not None:
        # under autocast the projection's output is narrower than the hidden states
        update = torch.zeros_like(flat).index_copy(0, step.tokens, update.to(flat.dtype))
    return update.view_as(hidden)


def _only(chosen: Tensor | None, x: Tensor) -> Tensor:
    """x (Q, ...) with zeros where not `chosen` (Q,). Not by a product: infinity times zero is no number."""
    if chosen is None:
        return x
    return torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))
