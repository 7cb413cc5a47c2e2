"""Tiny random models, offline and in float64, for tests: of casa itself and of what is built on it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa.models import CasaForConditionalGeneration, FusionConfig, adapt

VOCABULARY = 61


def tiny_text_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters, with grouped-query attention."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return _spread(LlamaForCausalLM(LlamaConfig(**(values | changes)))).to(dtype)


def tiny_encoder(seed: int = 1, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A Qwen2.5-VL image tower of two blocks, 28 px per token."""
    config = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=14,
        temporal_patch_size=1,
        out_hidden_size=24,
        fullatt_block_indexes=[1],
    )
    torch.manual_seed(seed)
    return _spread(Qwen2_5_VisionTransformerPretrainedModel._from_config(config)).to(dtype)


def tiny_casa(seed: int = 0, dtype: torch.dtype = torch.float64, **fusion: Any) -> CasaForConditionalGeneration:
    """A fused model whose image side matters: no weight is near zero."""
    model = adapt(tiny_text_model(seed, dtype), FusionConfig(**fusion), vision=tiny_encoder(seed + 1, dtype))
    torch.manual_seed(seed + 2)
    _spread(model.projector)
    for parameter in model.casa_layers.parameters():
        if parameter.numel() == 1:  # a gate that starts closed would hide the layer
            torch.nn.init.constant_(parameter, 0.7)
    return model.eval()


def tiny_images(grids: list[tuple[int, int]], seed: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """`pixel_values` and `image_grid_thw` of random pictures of (rows, columns) tokens each."""
    generator = torch.Generator().manual_seed(seed)
    patches = sum(4 * rows * columns for rows, columns in grids)
    return {
        "pixel_values": torch.randn(patches, 3 * 14 * 14, generator=generator, dtype=dtype),
        "image_grid_thw": torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]),
    }


def _spread(module: Any) -> Any:
    """Random weights large enough that every part of a tiny model changes its output; norms near one."""
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return module
