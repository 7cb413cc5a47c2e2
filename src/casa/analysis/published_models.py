"""Shapes of published models, written down so that their costs can be worked out without their weights.

Qwen's are those of the published config.json files. Helium's config.json was not at hand: its numbers are checked
from two sides, by the parameter count that its model card states (a test works it out from these shapes) and by the
KV memory that the paper's streaming table gives Helium1-VL-2B (section 5, 28 GiB for 262,144 tokens: 112 KiB a token),
which is that of 28 blocks of 8 key heads of 128 channels in bf16.
"""

import copy
from typing import Any

from transformers import CONFIG_MAPPING

from casa.errors import UserError
from casa.models import CasaConfig
from casa.models.adapt import has_own_tower
from casa.models.loading import read_config
from casa.vision import tower_config_of

_MROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
_QWEN_TOWER = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_QWEN_TEXT = {"max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "rope_parameters": _MROPE}

SHAPES: dict[str, dict[str, Any]] = {
    # kyutai/helium-1-2b: the paper's text-only backbone (2,023,868,416 parameters)
    "helium-2b": {
        "model_type": "helium",
        "vocab_size": 64_000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    # kyutai/helium-1-preview-2b, an earlier release with as many key heads as query heads (2,172,643,840)
    "helium-2b-preview": {
        "model_type": "helium",
        "vocab_size": 48_000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen2_5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "text_config": _QWEN_TEXT
        | {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "vision_config": _QWEN_TOWER | {"out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2_5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "text_config": _QWEN_TEXT
        | {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        "vision_config": _QWEN_TOWER | {"out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
}
TOWER_OF = "qwen2_5-vl-3b"  # whose image encoder a text-only model gets if nothing is said (paper, section 4)


def published_config(name: str) -> Any:
    """The transformers config of a shape of `SHAPES`; UserError for any other name."""
    if name not in SHAPES:
        raise UserError(f"there is no shape {name!r}; the known ones are: {', '.join(SHAPES)}.")
    values = copy.deepcopy(SHAPES[name])
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def shapes_of(backbone: Any, vision: Any = None, *, published: bool = False) -> tuple[Any, Any]:
    """The configs of a backbone and of the image encoder it is to get; the latter is None if it has one of its own.

    Args:
        backbone: A folder, a config.json, or, if `published`, the name of a shape. A model of casa's own stands for its
            backbone and its encoder.
        vision: A folder or config.json of an encoder or of a model that has one; the tower of Qwen2.5-VL-3B if left
            out.
        published: The backbone is one of `SHAPES`.

    Raises:
        UserError: Something cannot be read or is not known, or a VLM has no use for a tower.
    """
    config = published_config(backbone) if published else read_config(backbone)
    if isinstance(config, CasaConfig):
        # what it was made of, to be given every method in turn
        return config.text_config, config.vision_config
    if has_own_tower(config):
        if vision is not None:
            raise UserError("this backbone has an image encoder of its own; leave out vision.")
        return config, None
    tower = published_config(TOWER_OF).vision_config if vision is None else tower_config_of(read_config(vision))
    return config, tower
