"""Pictures to patches, exactly as transformers' `Qwen2VLImageProcessorPil` orders and scales them.

Legend: picture uint8 (H, W, 3), sides multiples of 28 px; patches (H/14 * W/14, 3 * 14 * 14): the four patches
of one merged token stand in a row, merged tokens in raster order. Bytes are kept as bytes until the batch is
formed, which is a quarter of the memory and of the traffic between processes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PATCH = 14
MERGE = 2
CELL = PATCH * MERGE
MEAN = STD = 0.5


def patchify(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Patches (H/14 * W/14, 588) of an RGB picture (H, W, 3), as bytes."""
    height, width, channels = picture.shape
    if height % CELL or width % CELL or channels != 3:
        raise ValueError(f"a picture of shape {picture.shape} cannot be cut; sides must be multiples of {CELL} px.")
    cut = picture.reshape(height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


def to_pixels(patches: Tensor | NDArray[np.uint8]) -> Tensor:
    """Bytes (..., 588) to normalised float32 of the same shape, within -1..1."""
    return (torch.as_tensor(patches).float() / 255 - MEAN) / STD
