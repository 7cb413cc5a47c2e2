"""Weights in fewer bytes, and the same to the bit, as tensors of a safetensors file like any other.

A 16-bit number of a trained weight is mostly a random fraction beside one of few exponents. So the bytes of a weight
are parted, all first ones before all second ones, and zipped: about two thirds are left. A packed weight is named
`name.packed`: uint8, a line with its dtype and shape, then what was zipped. Image encoders do not change.
"""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from casa.errors import UserError

SUFFIX = ".packed"
_PARTS = ("casa_layers.", "projector.")


def pack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, those of the fusion layers and the projector packed."""
    plain = {name: weight for name, weight in weights.items() if not name.startswith(_PARTS)}
    return plain | {name + SUFFIX: _packed(weight) for name, weight in weights.items() if name not in plain}


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given. Raises UserError for what it has not made."""
    plain = {name: weight for name, weight in stored.items() if not name.endswith(SUFFIX)}
    return plain | {name.removesuffix(SUFFIX): _unpacked(one) for name, one in stored.items() if name not in plain}


def _packed(weight: Tensor) -> Tensor:
    flat = weight.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8).numpy()
    head = " ".join([str(weight.dtype).removeprefix("torch."), *map(str, weight.shape)]) + "\n"
    return torch.frombuffer(bytearray(head.encode() + zlib.compress(flat.T.tobytes(), 9)), dtype=torch.uint8)


def _unpacked(stored: Tensor) -> Tensor:
    try:
        head, _, zipped = stored.numpy().tobytes().partition(b"\n")
        dtype, *sides = head.decode().split()
        kind, shape = getattr(torch, dtype), [int(side) for side in sides]
        size = int(np.prod(shape)) * kind.itemsize
        # no more than the weight's own bytes, whatever was zipped
        parted = np.frombuffer(zlib.decompressobj().decompress(zipped, size), np.uint8).reshape(kind.itemsize, -1)
        return torch.frombuffer(bytearray(parted.T.tobytes()), dtype=kind).view(shape) if size else torch.empty(shape)
    except (zlib.error, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"a packed weight is damaged ({error}); fetch the model's files again.") from error
