"""What the fusion must know of the models it gives eyes to: one small adapter per family, views that own nothing.

To add a family, see docs/adding-a-backbone.md.
"""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from casa.errors import UserError
from casa.models.backbones.decoder import Decoder
from casa.models.backbones.text_models import Gemma3Decoder, HeliumDecoder, SmolLM3Decoder
from casa.models.backbones.vlms import InsertionVLM, Qwen3VLDecoder, QwenVLDecoder, SmolVLMDecoder

FAMILIES: dict[str, type[Decoder]] = {
    "llama": Decoder,
    "mistral": Decoder,
    "qwen2": Decoder,
    "qwen3": Decoder,
    "smollm3": SmolLM3Decoder,
    "helium": HeliumDecoder,
    "gemma3_text": Gemma3Decoder,
    "qwen2_vl": QwenVLDecoder,
    "qwen2_5_vl": QwenVLDecoder,
    "qwen3_vl": Qwen3VLDecoder,
    "smolvlm": SmolVLMDecoder,
}


def register_decoder(model_type: str, family: type[Decoder]) -> None:
    """Makes a family known to `adapt`, by the `model_type` of its config."""
    FAMILIES[model_type] = family


def family_of(config: Any) -> type[Decoder]:
    """The adapter for models of a config. Raises UserError, with the reason, for one that is not known."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in FAMILIES:
        raise UserError(
            f"{kind!r} is not a model that casa knows: nothing says where its blocks, norms and rotary positions are. "
            f"Known: {', '.join(sorted(FAMILIES))}; docs/adding-a-backbone.md shows how to add one."
        )
    return FAMILIES[kind]


def decoder_of(model: nn.Module) -> Decoder:
    """The view of a model. Raises UserError for one that is not known."""
    return family_of(getattr(model, "config", None))(model)


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A text-only model or an insertion VLM with fresh weights, from its config."""
    is_vlm = issubclass(family_of(config), InsertionVLM)
    return (AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM).from_config(config)


__all__ = ["FAMILIES", "Decoder", "InsertionVLM", "decoder_of", "family_of", "new_backbone", "register_decoder"]
