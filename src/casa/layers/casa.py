"""The CASA layer: a block's self-attention, copied, with image tokens among its keys and values.

Shapes: B rows, L tokens, d width, Q real tokens, N image tokens, Hq query heads, Hkv key heads, D channels of a head.

Paper, "Mechanism" and "Initialisation": text queries look at the image tokens and the text of their window
in one softmax; the layer starts as a copy of the self-attention of its block; text enters through the block's
own input norm. Plain cross-attention is the same layer with images as its only keys.

An image token is the same for every layer, so its norm is taken once, without a gain, and each block's gain is folded
into its projections: (x * g) W^T = x (W diag(g))^T. What is left is one (N, d) x (d, 2 L Hkv D) product for all L
layers, forward and backward. The weights stay where they are, per layer, and are joined for the product. Where image
tokens do change with depth (deep-stack features, FFN updates) only layers that see the same ones are joined. A
projection that is more than its weight (quantised, with a LoRA adapter, fetched from another device when it is called)
is called like any module: its layer's image tokens take the gain first, and nothing is folded. So are all of them with
gradients off, where a call has few image tokens and folding the weights anew would cost more than it saves.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casa.layers.step import Step

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
IMAGE_PROJECTIONS = ("k_proj", "v_proj")
HEAD_NORMS = ("q_norm", "k_norm")


class CasaAttention(nn.Module):
    """A CASA layer with weights of its own, made from a block's self-attention module.

    Args:
        attention: Has `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim` and perhaps `q_norm`, `k_norm`; all are
            copied with their biases and dtypes.
        gate: "tanh" multiplies the output by tanh of a scalar that starts at zero (Flamingo's gate).

    Raises:
        ValueError: One of the projections is missing.
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
    weights: nn.Module, hidden: Tensor, step: Step, layer: int, *, gate: Tensor | None = None, replaces: bool = False
) -> Tensor:
    """Computes what a CASA layer adds to the text.

    Args:
        weights: The module with the projections.
        hidden: (B, L, d) after the block's input norm.
        step: This forward pass.
        layer: The layer's number.
        gate: A scalar whose tanh multiplies the update.
        replaces: The layer stands in for self-attention, so text that sees no image still attends to its window's text.

    Returns:
        (B, L, d). Zeros for padding and for text that sees no image, in the gradients too.
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


@dataclass(frozen=True)
class ImageNorm:
    """A block's input norm as image tokens see it: root mean square over d, then this gain (d,)."""

    gain: Tensor
    eps: float


def rms_norm(image: Tensor, eps: float) -> Tensor:
    """Divides image tokens (N, d) by their root mean square, in float32 as the block's norm does."""
    wide = image.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(image.dtype)


def project_images(
    images: Tensor | Sequence[Tensor], sources: Sequence[nn.Module], norms: Sequence[ImageNorm], group: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """Computes the keys and values of image tokens for every layer, before rotary positions.

    Args:
        images: The image tokens (N, d); where they change with depth, those of each layer.
        sources: Modules with `k_proj`, `v_proj` and, where the backbone has one, `k_norm`; one per layer.
        norms: The input norm of each layer's block.
        group: Layers joined in one product. More layers make a better product and hold more memory at once.

    Returns:
        Key and value (N, Hkv, D) of each layer.
    """
    found: list[tuple[Tensor, Tensor]] = []
    each = [images] * len(sources) if isinstance(images, Tensor) else images
    layers = list(zip(each, sources, norms, strict=True))
    first = 0
    while first < len(layers):
        image, _, norm = layers[first]
        stop = first + 1
        # `is`: equal values are not enough, and comparing them would cost more than it saves
        while stop < min(first + group, len(layers)) and layers[stop][0] is image and layers[stop][2].eps == norm.eps:
            stop += 1
        plain, run = rms_norm(image, norm.eps), [(source, gain.gain) for _, source, gain in layers[first:stop]]
        whole = all(is_its_weight(source.get_submodule(name)) for source, _ in run for name in IMAGE_PROJECTIONS)
        # folding gains into weights costs more than a single frame gets back; where the weights of all are folded for
        # a batch that is trained, its gradients are joined too
        if whole and torch.is_grad_enabled():
            found += _joined(plain, run)
        else:
            found += [_called(plain, source, gain) for source, gain in run]
        first = stop
    return found


def _joined(plain: Tensor, layers: list[tuple[nn.Module, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of normalised image tokens (N, d) for layers given as (source, gain of the norm)."""
    weights, biases, widths = [], [], []
    for source, gain in layers:
        for name in IMAGE_PROJECTIONS:
            linear = cast(nn.Linear, source.get_submodule(name))
            weights.append(linear.weight * gain.to(linear.weight.dtype))
            biases.append(linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias)
            widths.append(len(linear.weight))
    has_bias = any(source.get_submodule("k_proj").bias is not None for source, _ in layers)
    projected = F.linear(plain, torch.cat(weights), torch.cat(biases) if has_bias else None).split(widths, dim=-1)
    return [
        _heads(source, key, value)
        for (source, _), key, value in zip(layers, projected[::2], projected[1::2], strict=True)
    ]


def _called(plain: Tensor, source: nn.Module, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of normalised image tokens (N, d) for one layer, through the modules themselves."""
    image = plain * gain.to(plain.dtype)
    # kernels of quantised weights do not all take an empty matrix
    some = image if len(image) else image.new_zeros(1, image.shape[-1])
    key, value = (source.get_submodule(name)(some)[: len(image)] for name in IMAGE_PROJECTIONS)
    return _heads(source, key, value)


def is_its_weight(module: nn.Module) -> bool:
    """Whether a projection is its weight and bias and nothing else, so that they can stand for it.

    Not so if the module is of another class (LoRA, parametrised), its weight another kind of tensor (quantised), or
    something happens when it is called (hooks; accelerate puts another `forward` on a module it manages).
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
    )


def _heads(source: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(N, Hkv * D) to (N, Hkv, D), with the key norm that some backbones apply per head."""
    width: int = source.head_dim  # type: ignore[assignment]
    key, value = key.unflatten(-1, (-1, width)), value.unflatten(-1, (-1, width))
    norm = getattr(source, "k_norm", None)
    return (key if norm is None else norm(key)), value
