"""SigLIP, which sees squares of one size, and SigLIP2 "naflex", which sees pictures in their own proportions.

Shapes: n images, N patches of all images, M patches of the largest, p side of a patch, d_v width.

Their tokens are the patches after the last block and its LayerNorm (`last_hidden_state`), without the pooling
head, which makes one vector per picture. PaliGemma and Idefics3 take the same features; LLaVA takes those one
or two blocks earlier, which a caller gets from an encoder cut short (`num_hidden_layers`).
The fixed-resolution checkpoints of SigLIP2 are of the first kind ("siglip_vision_model").
"""

from typing import Any

import torch
from torch import Tensor

from casa.vision.encoders.family import Family


def _run_squares(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    size = encoder.config.image_size
    native = tuple(pixel_values.shape[-2:]) == (size, size)
    found = encoder(pixel_values, interpolate_pos_encoding=not native)
    return found.last_hidden_state.flatten(0, 1)


def _run_flexible(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    sides = grid[:, 1:]
    counts = sides.prod(dim=1)
    real = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]  # (n, M)
    padded = pixel_values.new_zeros(*real.shape, pixel_values.shape[-1])
    padded[real] = pixel_values
    return encoder(padded, pixel_attention_mask=real, spatial_shapes=sides).last_hidden_state[real]


SIGLIP_TOWERS = {
    "siglip_vision_model": Family(
        module="siglip.modeling_siglip", model="SiglipVisionModel", pictures="squares", run=_run_squares
    )
}
NAFLEX_TOWERS = {
    "siglip2_vision_model": Family(
        module="siglip2.modeling_siglip2",
        model="Siglip2VisionModel",
        pictures="flexible",
        run=_run_flexible,
        resample="bilinear",
    )
}
