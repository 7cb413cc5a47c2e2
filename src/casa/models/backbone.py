"""What the fusion must know of a text model: its blocks, their input norm, their rotary positions.

A decoder fits if its blocks run `input_layernorm` (root mean square, one gain) and then `self_attn`, and its
attention has the projections of Llama and rotary positions on the two halves of a head. Others are refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.layers import ImageNorm, Rotary

KNOWN = ("llama",)


@dataclass(frozen=True)
class Decoder:
    """Views into a causal language model of transformers; owns nothing."""

    model: nn.Module

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule("model.layers")  # type: ignore[return-value]

    def image_norm(self, block: int) -> ImageNorm:
        """The norm that text enters the block's attention through, for image tokens."""
        norm = self.blocks[block].get_submodule("input_layernorm")
        return ImageNorm(norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]

    def rotary(self, device: torch.device, dtype: torch.dtype) -> Rotary:
        """The backbone's own rotary positions, by position."""
        module = self.model.get_submodule("model.rotary_emb")
        like = torch.empty(0, device=device, dtype=dtype)

        def positions_to_factors(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = module(like, positions.to(device)[None])
            return cos[0], sin[0]

        return positions_to_factors


def decoder_of(model: nn.Module) -> Decoder:
    """The view of a text model. Raises UserError, with the reason, for one that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in KNOWN:
        raise UserError(f"{kind!r} is not a text model that casa knows yet; known: {', '.join(KNOWN)}.")
    return Decoder(model)
