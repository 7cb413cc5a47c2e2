"""Image keys and values of all CASA layers from one matrix product (the image side never depends on text).

Shapes: N image tokens, d width, L layers, Hkv key heads, D channels of a head.

An image token is the same for every layer, so its norm is taken once, without a gain, and each block's gain
is folded into its projections: (x * g) W^T = x (W diag(g))^T. What is left is one (N, d) x (d, 2 L Hkv D)
product, forward and backward. The weights stay where they are, per layer, and are joined for the product.
Where image tokens do change with depth (deep-stack features, FFN updates) only layers that see the same ones
are joined. A projection that is more than its weight (quantised, with a LoRA adapter, fetched from another device
when it is called) is called like any module: its layer's image tokens take the gain first, and nothing is folded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class ImageNorm:
    """A block's input norm as image tokens see it: root mean square over d, then this gain (d,)."""

    gain: Tensor
    eps: float


def normalise(image: Tensor, eps: float) -> Tensor:
    """Image tokens (N, d) over their root mean square, in float32 whatever the dtype, as the block's norm does it."""
    wide = image.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(image.dtype)


def project_images(
    images: Tensor | Sequence[Tensor], sources: Sequence[nn.Module], norms: Sequence[ImageNorm], group: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, Hkv, D) of the image tokens (N, d) for every layer, before rotary positions.

    images: the image tokens; where they change with depth, those of each layer.
    sources: modules with `k_proj`, `v_proj` and, where the backbone has one, `k_norm`; one per layer.
    norms: the input norm of each layer's block.
    group: layers joined in one product. More layers make a better product and more memory held at once.
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
        plain, run = normalise(image, norm.eps), [(source, gain.gain) for _, source, gain in layers[first:stop]]
        if all(_is_its_weight(source.get_submodule(name)) for source, _ in run for name in PROJECTIONS):
            found += _joined(plain, run)
        else:
            found += [_called(plain, source, gain) for source, gain in run]
        first = stop
    return found


def _joined(plain: Tensor, layers: list[tuple[nn.Module, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of normalised image tokens (N, d) for layers given as (source, gain of the norm)."""
    weights, biases, widths = [], [], []
    for source, gain in layers:
        for name in PROJECTIONS:
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
    key, value = (source.get_submodule(name)(some)[: len(image)] for name in PROJECTIONS)
    return _heads(source, key, value)


def _is_its_weight(module: nn.Module) -> bool:
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
