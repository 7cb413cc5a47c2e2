"""What is trained: everything, or (paper, route b) only what fusion added and the last blocks of the image encoder."""

from typing import Any

from torch import nn

from casa.errors import UserError

# what `adapt` adds beside a backbone
ADDED = ("casa_layers", "projector", "compressor", "gist")
# where image encoders of transformers keep their blocks
_BLOCKS = ("blocks", "encoder.layers", "vision_model.encoder.layers")


def freeze_backbone(model: Any, tower_blocks: int = 4) -> None:
    """Leaves to training only what `adapt` added and the last `tower_blocks` blocks of the image encoder.

    Layers without weights of their own ("replace", `share_weights`) train the self-attention that they borrow.
    model: a CasaForConditionalGeneration. Raises UserError for an encoder whose blocks cannot be found.
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
