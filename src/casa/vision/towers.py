"""The image towers of transformers that casa knows: Qwen-VL, SigLIP, SigLIP2, SmolVLM and Idefics3.

Shapes: n images, N patches of all images, M patches of the largest, p side of a patch.

- Qwen2-VL, Qwen2.5-VL, Qwen3-VL: native resolution, 2x2 patches merged into a token. They take all images in one call,
  as one row of patches with their grids, and keep the images apart themselves. Qwen3-VL also reads its features at k
  earlier depths; its text model adds them to the image tokens in its first k blocks ("deep-stack"). Here they stand
  beside the token, as further channels.
- SigLIP sees squares of one size, SigLIP2 "naflex" pictures in their own proportions. Their tokens are the patches
  after the last block and its LayerNorm (`last_hidden_state`), without the pooling head, which makes one vector per
  picture. PaliGemma and Idefics3 take the same features; LLaVA takes those one or two blocks earlier, which a caller
  gets from an encoder cut short (`num_hidden_layers`). SigLIP2 of one resolution is a "siglip_vision_model" too.
- SmolVLM and Idefics3: a SigLIP that sees squares, its patches placed by fractions of the side. One picture is one full
  square here, so that nothing is padded. Their own models cut a large picture into such squares and add a small view
  of the whole; a caller who wants that gives each square as an image.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casa.vision.encoder import SPECS, EncoderSpec


class PatchProduct(nn.Conv3d):
    """A convolution whose kernel covers each patch whole: one product, at an eighth of the time on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(P, c, t, p, p) -> (P, d, 1, 1, 1)"""
        if tuple(input.shape[2:]) != self.kernel_size or any(self.padding):
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def _called(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Any:
    """What a Qwen tower gives, its patches multiplied; the convolution keeps its name and weights."""
    if type(encoder.patch_embed.proj) is nn.Conv3d:
        encoder.patch_embed.proj.__class__ = PatchProduct
    return encoder(pixel_values, grid_thw=grid)


def _run_qwen(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    return _called(encoder, pixel_values, grid).pooler_output


def _run_qwen3(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    found = _called(encoder, pixel_values, grid)
    return torch.cat([found.pooler_output, *found.deepstack_features], dim=-1)


def _run_siglip(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    size = encoder.config.image_size
    native = tuple(pixel_values.shape[-2:]) == (size, size)
    found = encoder(pixel_values, interpolate_pos_encoding=not native)
    return found.last_hidden_state.flatten(0, 1)


def _run_naflex(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    sides = grid[:, 1:]
    counts = sides.prod(dim=1)
    real = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]  # (n, M)
    padded = pixel_values.new_zeros(*real.shape, pixel_values.shape[-1])
    padded[real] = pixel_values
    return encoder(padded, pixel_attention_mask=real, spatial_shapes=sides).last_hidden_state[real]


def _run_smolvlm(encoder: Any, pixel_values: Tensor, grid: Tensor) -> Tensor:
    # this tower, unlike the others, does not bring pixels to its own type
    weight = encoder.embeddings.patch_embedding.weight
    return encoder(pixel_values.to(weight.dtype)).last_hidden_state.flatten(0, 1)


def _qwen(model: str, **more: Any) -> EncoderSpec:
    return EncoderSpec(model=model, pictures="patches", merge=lambda config: config.spatial_merge_size, **more)


def _qwen3(model: str) -> EncoderSpec:
    return _qwen(
        model,
        run=_run_qwen3,
        width=lambda config: config.out_hidden_size,
        depths=lambda config: len(config.deepstack_visual_indexes),
    )


def _smolvlm(model: str) -> EncoderSpec:
    return EncoderSpec(model=model, pictures="squares", run=_run_smolvlm, resample="lanczos")


SPECS |= {
    # `hidden_size` is what the text side gets; the tower's own width is called `embed_dim`
    "qwen2_vl_vision": _qwen(
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel", run=_run_qwen, clip_colours=True
    ),
    "qwen2_5_vl_vision": _qwen(
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        run=_run_qwen,
        width=lambda config: config.out_hidden_size,
        clip_colours=True,
    ),
    "qwen3_vl_vision": _qwen3("qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel"),
    "qwen3_vl_moe_vision": _qwen3("qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel"),
    "siglip_vision_model": EncoderSpec(
        model="siglip.modeling_siglip.SiglipVisionModel", pictures="squares", run=_run_siglip
    ),
    "siglip2_vision_model": EncoderSpec(
        model="siglip2.modeling_siglip2.Siglip2VisionModel", pictures="flexible", run=_run_naflex, resample="bilinear"
    ),
    "smolvlm_vision": _smolvlm("smolvlm.modeling_smolvlm.SmolVLMVisionTransformer"),
    "idefics3_vision": _smolvlm("idefics3.modeling_idefics3.Idefics3VisionTransformer"),
}
