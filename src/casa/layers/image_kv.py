"""Image keys and values of all CASA layers from one matrix product (the image side never depends on text).

Shapes: N image tokens, d width, L layers, Hkv key heads, D channels of a head.

An image token is the same for every layer, so its norm is taken once, without a gain, and each block's gain
is folded into its projections: (x * g) W^T = x (W diag(g))^T. What is left is one (N, d) x (d, 2 L Hkv D)
product, forward and backward. The weights stay where they are, per layer, and are joined for the product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    image: Tensor, sources: Sequence[nn.Module], norms: Sequence[ImageNorm], group: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, Hkv, D) of the image tokens (N, d) for every layer, before rotary positions.

    sources: modules with `k_proj`, `v_proj` and, where the backbone has one, `k_norm`; one per layer.
    norms: the input norm of each layer's block.
    group: layers joined in one product. More layers make a better product and more memory held at once.
    """
    plain = {norm.eps: normalise(image, norm.eps) for norm in norms}
    found: list[tuple[Tensor, Tensor]] = []
    pairs = list(zip(sources, norms, strict=True))
    for part in (pairs[first : first + group] for first in range(0, len(pairs), group)):
        if len({norm.eps for _, norm in part}) > 1:
            raise ValueError("layers projected together must share the epsilon of their norm")
        weights, biases, widths = [], [], []
        for source, norm in part:
            for name in ("k_proj", "v_proj"):
                linear = cast(nn.Linear, source.get_submodule(name))
                weight, bias = linear.weight, linear.bias
                weights.append(weight * norm.gain.to(weight.dtype))
                biases.append(weight.new_zeros(weight.shape[0]) if bias is None else bias)
                widths.append(weight.shape[0])
        bias = torch.cat(biases) if any(s.get_submodule("k_proj").bias is not None for s, _ in part) else None
        projected = F.linear(plain[part[0][1].eps], torch.cat(weights), bias).split(widths, dim=-1)
        for (source, _), key, value in zip(part, projected[::2], projected[1::2], strict=True):
            found.append(_heads(source, key, value))
    return found


def _heads(source: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(N, Hkv * D) to (N, Hkv, D), with the key norm that some backbones apply per head."""
    width: int = source.head_dim  # type: ignore[assignment]
    key, value = key.unflatten(-1, (-1, width)), value.unflatten(-1, (-1, width))
    norm = getattr(source, "k_norm", None)
    return (key if norm is None else norm(key)), value
