"""Muon: momentum whose update is made orthogonal, for the matrices inside a transformer's blocks.

It needs about half as many steps as AdamW to teach casa-tiny's image tower. Matrices
of one shape go through the Newton-Schulz iteration together: on a CPU, one call on a stack costs a fraction of
many calls.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (coefficients, iteration);
Liu et al., arXiv 2502.16982 (scale 0.2 sqrt(max side), which lets it share AdamW's learning rates and decay).
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
MOMENTUM = 0.95
STACK = 2**26  # numbers of the matrices that are made orthogonal together, at most: some copies of them exist at once
_JOINED = {"qkv.weight": 3, "key_value.weight": 2}


def orthogonalise(stack: Tensor) -> Tensor:
    """Matrices (n, r, c), r <= c, to about their nearest with all singular values 1."""
    a, b, c = _COEFFICIENTS
    x = stack / (stack.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def is_inner(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix inside a block of the text model, the tower or the compressor, or inside a fusion layer.

    Embeddings, heads, the projector and LoRA are AdamW's, and so are experts that are kept as one (E, r, c).
    """
    parts = name.split(".")
    inside = any(part in ("layers", "blocks", "casa_layers") for part in parts)
    return parameter.ndim == 2 and inside and not any(part.startswith("lora_") for part in parts)


def parts_of(name: str) -> int:
    """How many matrices a parameter of that name is, one above the other: `...qkv.weight` is three."""
    return next((count for ending, count in _JOINED.items() if name.endswith(ending)), 1)


def split(parameter: Tensor, momentum: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The matrices of a parameter with their gradients and momenta, as `muon_step` takes them."""
    assert parameter.grad is not None
    return zip(parameter.data.chunk(parts), parameter.grad.chunk(parts), momentum.chunk(parts), strict=True)


@torch.no_grad()
def muon_step(members: Iterable[tuple[Tensor, Tensor, Tensor]], rate: float, weight_decay: float) -> None:
    """Moves matrices in place, by `rate`. members: (matrix, gradient, momentum), each (r, c); momentum is updated too.

    A matrix whose gradient is zero stays, but for its decay: nothing of the step's data has reached it, and made
    orthogonal, what is left of its momentum would be a whole step.
    """
    shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for matrix, gradient, momentum in members:
        if matrix.shape[0] > matrix.shape[1]:
            matrix, gradient, momentum = matrix.T, gradient.T, momentum.T
        shapes.setdefault((matrix.shape[0], matrix.shape[1]), []).append((matrix, gradient, momentum))
    for (shorter, longer), same in shapes.items():
        most = max(1, STACK // (shorter * longer))
        for start in range(0, len(same), most):
            stack = same[start : start + most]
            steps = orthogonalise(torch.stack([_direction(gradient, momentum) for _, gradient, momentum in stack]))
            for (matrix, _, _), step in zip(stack, steps, strict=True):
                matrix.mul_(1 - rate * weight_decay).add_(step, alpha=-rate * 0.2 * math.sqrt(longer))


def _direction(gradient: Tensor, momentum: Tensor) -> Tensor:
    momentum.mul_(MOMENTUM).add_(gradient)
    # a factor, and no question: the device is not waited for
    return gradient.add(momentum, alpha=MOMENTUM) * (gradient != 0).any()
