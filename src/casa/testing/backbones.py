"""One tiny random model of every family that casa knows, in float64; most in three blocks and 61 tokens.

Pictures of `TinySample` fit all of them but SmolVLM, whose tower takes squares of 16 patches (`in_squares`).
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from casa.models import CasaForConditionalGeneration, FusionConfig, adapt
from casa.testing.tiny import VOCABULARY, spread, tiny_encoder

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 14,
    "temporal_patch_size": 1,
    "out_hidden_size": 32,
}
_MARKS = {"image_token_id": 58, "video_token_id": 59, "vision_start_token_id": 56, "vision_end_token_id": 57}


def _text(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_config(getattr(transformers, name)(**(_TEXT | changes)))


def _vlm(name: str, text: dict[str, Any], tower: dict[str, Any], **top: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, name)(
            text_config=_TEXT | text, vision_config=tower, tie_word_embeddings=False, **top
        )
        return AutoModelForImageTextToText.from_config(config)

    return build


TEXT_BACKBONES: dict[str, Callable[[], Any]] = {
    "llama": _text("LlamaConfig"),
    "mistral": _text("MistralConfig", sliding_window=None),
    "qwen2": _text("Qwen2Config"),
    "qwen3": _text("Qwen3Config"),
    "smollm3": _text("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "helium": _text("HeliumConfig"),
    "gemma3_text": _text(
        "Gemma3TextConfig",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=64,
        query_pre_attn_scalar=16,
    ),
}

VLM_BACKBONES: dict[str, Callable[[], Any]] = {
    "qwen2_vl": _vlm(
        "Qwen2VLConfig",
        {"rope_parameters": _MROPE},
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 1},
        **_MARKS,
    ),
    "qwen2_5_vl": _vlm(
        "Qwen2_5_VLConfig",
        {"rope_parameters": _MROPE},
        _TOWER | {"intermediate_size": 24, "fullatt_block_indexes": [1]},
        **_MARKS,
    ),
    "qwen3_vl": _vlm(
        "Qwen3VLConfig",
        {"rope_parameters": _MROPE},
        _TOWER | {"intermediate_size": 24, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **_MARKS,
    ),
    "smolvlm": _vlm(
        "SmolVLMConfig",
        {"model_type": "llama"},
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=58,
        scale_factor=2,
    ),
}

BACKBONES = TEXT_BACKBONES | VLM_BACKBONES


def tiny_backbone(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model of a family, with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    return spread(BACKBONES[kind]()).to(dtype).eval()


def tiny_casa_over(kind: str, seed: int = 0, **fusion: Any) -> CasaForConditionalGeneration:
    """The same, fused in float64; text-only models with a Qwen2.5-VL tower. All of it can be trained."""
    vision = tiny_encoder(seed + 1) if kind in TEXT_BACKBONES else None
    model = adapt(tiny_backbone(kind, seed), FusionConfig(**fusion), vision=vision)
    torch.manual_seed(seed + 2)
    for name in ("projector", "compressor", "gist"):
        if (part := getattr(model, name, None)) is not None:
            spread(part)
    return model.eval().requires_grad_(True)
