"""Rotary positions, applied to packed queries and keys.

Shapes: T tokens, H heads, D channels of a head. `cos` and `sin` are (T, D), as the backbone's own rotary
module makes them, so every scaling rule of the backbone (linear, YaRN, Llama 3 ...) comes along.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""int64 positions (T,) -> cos and sin, each (T, D)."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (T, H, D) by its positions; the two halves of a head's channels form the pairs that turn."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def turner(rotary: Rotary) -> Callable[[Tensor, int], Tensor]:
    """A function that moves already rotated keys (n, H, D) by a whole number of positions.

    Rotations add up, so a key at position p turned by d is the key at p + d. The scale that some rotary
    rules put on cos and sin is already in the key and is divided out.
    """

    def turn(key: Tensor, distance: int) -> Tensor:
        if distance == 0:
            return key
        cos, sin = rotary(torch.tensor([0, distance], device=key.device))
        scale = cos[:1, :1]
        return rotate(key, cos[1:] / scale, sin[1:] / scale)

    return turn
