"""adapt: gives eyes to a model that people already have."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from casa.errors import UserError
from casa.models.backbone import decoder_of
from casa.models.config import CasaConfig
from casa.models.fusion_config import FusionConfig
from casa.models.loading import load_checked
from casa.models.model import ENCODERS, CasaForConditionalGeneration


def adapt(backbone: Any, fusion: FusionConfig | None = None, vision: Any = None) -> CasaForConditionalGeneration:
    """A CASA model over a text-only causal language model and an image encoder.

    backbone: a transformers model of the Llama family, or its path. It is taken over, not copied: its
        parameters become the new model's, under `backbone.`.
    vision: a Qwen2.5-VL image encoder or its path. A projector to the text width is made, untrained.
    fusion: CASA⊕ in every block if left out. Fusion layers start as copies of their block's self-attention.
    Raises UserError for a backbone or an encoder that is not known, or whose weights are not complete.
    """
    fusion = fusion if fusion is not None else FusionConfig()
    text_model = _loaded(backbone, "text model", _load_text_model)
    decoder_of(text_model)
    if vision is None:
        raise UserError("a text-only model needs an image encoder; pass vision=<a Qwen2.5-VL tower or its path>.")
    encoder = _loaded(vision, "image encoder", _load_encoder)
    if encoder.config.model_type not in ENCODERS:
        raise UserError(f"{encoder.config.model_type!r} is not an image encoder that casa knows yet.")
    config = _joint_config(text_model, encoder, fusion)
    model = CasaForConditionalGeneration(config, backbone=text_model, vision=encoder)
    model.projector.to(text_model.device, text_model.dtype)
    model.initialise_fusion()
    model.generation_config = text_model.generation_config
    return model


def _joint_config(text_model: PreTrainedModel, encoder: PreTrainedModel, fusion: FusionConfig) -> CasaConfig:
    parts = (text_model.config, encoder.config)
    chosen = [part._attn_implementation for part in parts]
    config = CasaConfig(text_config=parts[0], vision_config=parts[1], fusion=fusion)
    # a joint config resets the attention implementation of its parts, which are running already
    for part, implementation in zip(parts, chosen, strict=True):
        part._attn_implementation = implementation
    config.dtype = text_model.dtype
    return config


def _loaded(given: Any, what: str, load: Any) -> PreTrainedModel:
    if isinstance(given, PreTrainedModel):
        return given
    if isinstance(given, nn.Module):
        raise UserError(f"the {what} is a {type(given).__name__}; give a transformers model or its path.")
    return load_checked(load, given)


def _load_text_model(path: str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **kwargs)


def _load_encoder(path: str, **kwargs: Any) -> Any:
    kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    return ENCODERS.get(kind, AutoModel).from_pretrained(path, **kwargs)
