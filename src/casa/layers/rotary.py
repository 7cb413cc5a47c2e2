"""Rotary positions, applied to packed queries and keys.

Shapes: T tokens, H heads, D channels of a head. `cos` and `sin` are (T, D), as the backbone's own rotary
module makes them, so every scaling rule of the backbone (linear, YaRN, Llama 3 ...) comes along.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How far the tokens turn: cos and sin (T, D).

    Which channels turn together: the two halves of a head, channel c with c + D / 2, in most backbones;
    neighbours, channel 2c with 2c + 1, if `neighbours` (Helium).
    """

    cos: Tensor
    sin: Tensor
    neighbours: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x (T, H, D)."""
        if self.neighbours:
            across = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        else:
            left, right = x.chunk(2, dim=-1)
            across = torch.cat([-right, left], dim=-1)
        return x * self.cos[:, None] + across * self.sin[:, None]

    @property
    def turns_nothing(self) -> bool:
        """Whether it leaves everything as it is: position 0, unless the backbone scales its rotary factors."""
        return not bool(self.sin.any()) and bool((self.cos == 1).all())


Rotary = Callable[[Tensor], Rotation]
"""int64 positions, (T,) or one row per axis (axes, T) -> the rotation of T tokens."""


def turner(rotary: Rotary | None) -> Callable[[Tensor, int], Tensor]:
    """A function that moves already rotated keys (n, H, D) by a whole number of positions.

    Rotations add up, so a key at position p turned by d is the key at p + d. The scale that some rotary
    rules put on cos and sin is already in the key and is divided out. Keys without rotary positions stay.
    """

    def turn(key: Tensor, distance: int) -> Tensor:
        if distance == 0 or rotary is None:
            return key
        both = rotary(torch.tensor([0, distance], device=key.device))
        scale = both.cos[:1, :1]
        return Rotation(both.cos[1:] / scale, both.sin[1:] / scale, both.neighbours)(key)

    return turn
