"""adapt: gives eyes to a model that people already have; what is trained of it, and its shape from configs alone."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from casa.errors import UserError
from casa.models.backbone_source import load_backbone, unpacked
from casa.models.backbones import InsertionVLM, decoder_of, family_of, new_backbone
from casa.models.configuration_casa import CasaConfig, FusionConfig
from casa.models.loading import is_own, load_checked, resolve
from casa.models.modeling_casa import CasaForConditionalGeneration
from casa.vision import is_known, load_encoder, new_encoder

# what `adapt` adds beside a backbone
ADDED = ("casa_layers", "projector", "compressor", "gist")
# where image encoders of transformers keep their blocks
_BLOCKS = ("blocks", "encoder.layers", "vision_model.encoder.layers")


def freeze_backbone(model: Any, tower_blocks: int = 4) -> None:
    """Leaves to training only what `adapt` added and the last `tower_blocks` blocks of the image encoder.

    Layers without weights of their own ("replace", `share_weights`) train the self-attention that they borrow.

    Args:
        model: A CasaForConditionalGeneration.

    Raises:
        UserError: The encoder's blocks cannot be found.
    """
    model.requires_grad_(False)
    for name in ADDED:
        if (part := getattr(model, name, None)) is not None:
            part.requires_grad_(True)
    if model.fusion.borrows:
        for index in model.fused_blocks:
            model.decoder.attention(index).requires_grad_(True)
    if tower_blocks:
        for block in encoder_blocks(model.encoder)[-tower_blocks:]:
            block.requires_grad_(True)


def encoder_blocks(encoder: nn.Module) -> nn.ModuleList:
    """The transformer blocks of an image encoder."""
    for path in _BLOCKS:
        try:
            return encoder.get_submodule(path)  # type: ignore[return-value]
        except AttributeError:
            continue
    raise UserError(f"{type(encoder).__name__} has no blocks where casa looks for them; set requires_grad by hand.")


_KEPT = ("compressor", "gist", "projector")


def check_refit(before: FusionConfig, fusion: FusionConfig) -> None:
    """UserError if a model with `before` cannot be given `fusion` in its place."""
    if before.method != "insertion":
        raise UserError("this model has fusion layers already; adapt an insertion model, or the backbone it came from.")
    for name in _KEPT:
        if getattr(before, name) != getattr(fusion, name):
            raise UserError(f"the model was trained with {name}={getattr(before, name)}; give fusion the same.")


def refit(model: CasaForConditionalGeneration, fusion: FusionConfig, config: Any) -> CasaForConditionalGeneration:
    """The insertion model's own parts, taken over, with new fusion layers that copy its self-attention.

    Args:
        config: Of the new model. All that was there is frozen but the last four blocks of the image tower (paper, route
            b) and the self-attention that layers without weights of their own borrow.

    Raises:
        UserError: As `check_refit` does.
    """
    check_refit(model.fusion, fusion)
    joined = CasaForConditionalGeneration(config, backbone=model.backbone, vision=getattr(model, "vision", None))
    joined.initialise_fusion()
    freeze_backbone(joined)
    for name in _KEPT:
        if (part := getattr(model, name, None)) is not None:
            setattr(joined, name, part.requires_grad_(False))
    joined.generation_config = model.generation_config
    return joined.train(model.training)


_HAS_EYES = "this backbone has an image encoder of its own; leave out vision."


def adapt(backbone: Any, fusion: FusionConfig | None = None, vision: Any = None) -> CasaForConditionalGeneration:
    """A CASA model over a language model of transformers, or its path.

    A VLM comes back frozen but for what fusion added and the last four blocks of its tower (paper, route b); of a
    text-only model everything is trained (route a). See `freezing` for other choices. It is in the backbone's mode: one
    that was loaded is in evaluation mode.

    Args:
        backbone: A text-only causal language model, or an insertion VLM (`casa.models.backbones` lists the families),
            or a casa model with method="insertion". It is taken over, not copied: its parameters become the new
            model's, under `backbone.`. A path may be that of a GGUF file, or of a folder with one: its weights become
            plain floats.
        vision: The image encoder of a text-only model, or its path; a projector to the text width is made, untrained. A
            VLM keeps its own.
        fusion: CASA⊕ in every block if left out. Fusion layers start as copies of their block's self-attention.

    Raises:
        UserError: The backbone or the encoder is not known, or its weights are not complete.
    """
    fusion = fusion if fusion is not None else FusionConfig()
    if not isinstance(backbone, nn.Module) and is_own(resolve(backbone)):
        backbone, name = CasaForConditionalGeneration.from_pretrained(backbone), str(backbone)
    else:
        name = None
    if isinstance(backbone, CasaForConditionalGeneration):
        if vision is not None:
            raise UserError(_HAS_EYES)
        config = _joint_config(backbone.backbone, getattr(backbone, "vision", None), fusion)
        joined = refit(backbone, fusion, config)
        joined.backbone_name = name or backbone.backbone_name
        return joined
    model = unpacked(_checked(backbone, "backbone")) if isinstance(backbone, nn.Module) else load_backbone(backbone)
    has_eyes = isinstance(decoder_of(model), InsertionVLM)
    if has_eyes:
        if vision is not None:
            raise UserError(_HAS_EYES)
        encoder = None
    elif vision is None:
        raise UserError(
            "a text-only model needs an image encoder; pass vision=<a Qwen2.5-VL or SigLIP tower, or its path>."
        )
    else:
        given = isinstance(vision, nn.Module)
        encoder = _checked(vision, "image encoder") if given else load_checked(load_encoder, vision)
        if not is_known(encoder.config):
            raise UserError(f"{encoder.config.model_type!r} is not an image encoder that casa knows.")
    config = _joint_config(model, encoder, fusion)
    joined = CasaForConditionalGeneration(config, backbone=model, vision=encoder)
    for name in ("projector", "compressor", "gist"):
        if (part := getattr(joined, name, None)) is not None:
            part.to(model.device, model.dtype)
    joined.initialise_fusion()
    joined.generation_config = model.generation_config
    joined.backbone_name = model.config._name_or_path if isinstance(backbone, nn.Module) else str(backbone)
    if has_eyes:
        freeze_backbone(joined)
    return joined.train(model.training)


def _joint_config(model: PreTrainedModel, encoder: PreTrainedModel | None, fusion: FusionConfig) -> CasaConfig:
    running = [*configs_in(model.config), *(configs_in(encoder.config) if encoder is not None else ())]
    chosen = [part._attn_implementation for part in running]
    vision = encoder.config if encoder is not None else None
    config = CasaConfig(text_config=model.config, vision_config=vision, fusion=fusion)
    # a joint config resets the attention implementation of its parts, which are running already
    for part, implementation in zip(running, chosen, strict=True):
        part._attn_implementation = implementation
    config.dtype = model.dtype
    return config


def configs_in(config: Any) -> list[Any]:
    """A config and all configs inside it."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(found for part in inner if part is not None for found in configs_in(part))]


def _checked(given: nn.Module, what: str) -> PreTrainedModel:
    if isinstance(given, PreTrainedModel):
        return given
    raise UserError(f"the {what} is a {type(given).__name__}; give a transformers model or its path.")


def has_own_tower(config: Any) -> bool:
    """Whether a backbone's config is one of an insertion VLM, or of a model of casa's own.

    Raises UserError for a family that casa does not know.
    """
    return isinstance(config, CasaConfig) or issubclass(family_of(config), InsertionVLM)


def skeleton(config: Any, fusion: FusionConfig, tower_config: Any = None) -> CasaForConditionalGeneration:
    """The fused model on the meta device, from configs alone: names, shapes, and what `adapt` leaves to training.

    Args:
        config: Of a text-only model, which needs a tower_config, or of an insertion VLM or model.

    Raises:
        UserError: As `adapt` does.
    """
    with torch.device("meta"):
        # building a model writes into its config
        config = copy.deepcopy(config)
        own = isinstance(config, CasaConfig)
        backbone = CasaForConditionalGeneration(config) if own else new_backbone(config)
        tower = None if tower_config is None else new_encoder(copy.deepcopy(tower_config))
        return adapt(backbone, fusion, tower)
