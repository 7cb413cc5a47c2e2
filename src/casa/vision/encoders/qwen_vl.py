"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, 2x2 patches merged into a token.

Shapes: P patches, n images, N image tokens, k deep-stack levels, d_v width of a token.

They take all images in one call, as one row of patches with their grids, and keep the images apart themselves.
Qwen3-VL also reads its features at k earlier depths; its text model adds them to the image tokens in its first
k blocks ("deep-stack"). Here they stand beside the token, as further channels.
"""

from typing import Any

import torch
from torch import Tensor

from casa.vision.encoders.family import Family


def _merge(config: Any) -> int:
    return config.spatial_merge_size


def _run(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    return encoder(pixel_values, grid_thw=grid).pooler_output


def _run_with_depths(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    found = encoder(pixel_values, grid_thw=grid)
    return torch.cat([found.pooler_output, *found.deepstack_features], dim=-1)


def _qwen3(module: str, model: str) -> Family:
    return Family(
        module=module,
        model=model,
        pictures="patches",
        run=_run_with_depths,
        width=lambda config: config.out_hidden_size,
        merge=_merge,
        depths=lambda config: len(config.deepstack_visual_indexes),
    )


QWEN_TOWERS = {
    # `hidden_size` is what the text side gets; the tower's own width is called `embed_dim`
    "qwen2_vl_vision": Family(
        module="qwen2_vl.modeling_qwen2_vl",
        model="Qwen2VisionTransformerPretrainedModel",
        pictures="patches",
        run=_run,
        merge=_merge,
        clip_colours=True,
    ),
    "qwen2_5_vl_vision": Family(
        module="qwen2_5_vl.modeling_qwen2_5_vl",
        model="Qwen2_5_VisionTransformerPretrainedModel",
        pictures="patches",
        run=_run,
        width=lambda config: config.out_hidden_size,
        merge=_merge,
        clip_colours=True,
    ),
    "qwen3_vl_vision": _qwen3("qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionModel"),
    "qwen3_vl_moe_vision": _qwen3("qwen3_vl_moe.modeling_qwen3_vl_moe", "Qwen3VLMoeVisionModel"),
}
