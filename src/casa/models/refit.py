"""Another way to see for a model of casa's own: an insertion model is the VLM that it is, and is given layers."""

from typing import Any

from casa.errors import UserError
from casa.models.freezing import freeze_backbone
from casa.models.fusion_config import FusionConfig
from casa.models.model import CasaForConditionalGeneration

_KEPT = ("compressor", "gist")


def check_refit(before: FusionConfig, fusion: FusionConfig) -> None:
    """UserError if a model with `before` cannot be given `fusion` in its place."""
    if before.method != "insertion":
        raise UserError("this model has fusion layers already; adapt an insertion model, or the backbone it came from.")
    for name in _KEPT:
        if getattr(before, name) != getattr(fusion, name):
            raise UserError(f"the model was trained with {name}={getattr(before, name)}; give fusion the same.")


def refit(model: CasaForConditionalGeneration, fusion: FusionConfig, config: Any) -> CasaForConditionalGeneration:
    """The insertion model's own parts, taken over, with new fusion layers that copy its self-attention.

    config: of the new model. All that was there is frozen but the last four blocks of the image tower (paper, route b)
    and the self-attention that layers without weights of their own borrow.
    Raises UserError like `check_refit`.
    """
    check_refit(model.fusion, fusion)
    joined = CasaForConditionalGeneration(config, backbone=model.backbone, vision=getattr(model, "vision", None))
    joined.initialise_fusion()
    freeze_backbone(joined)
    for name in ("projector", *_KEPT):
        if (part := getattr(model, name, None)) is not None:
            setattr(joined, name, part.requires_grad_(False))
    joined.generation_config = model.generation_config
    return joined.train(model.training)
