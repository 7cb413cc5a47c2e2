"""Text-only language models that differ from Llama: Helium, SmolLM3, Gemma 3.

Llama, Mistral, Qwen2 (biases) and Qwen3 (norms of query and key heads) need no adapter of their own: a CASA layer
copies whatever projections, biases and head norms a block has.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from casa.layers import ImageNorm, Rotary
from casa.models.backbones.decoder import Decoder


class HeliumDecoder(Decoder):
    """Helium turns neighbouring channels together."""

    rotary_neighbours: ClassVar[bool] = True


class SmolLM3Decoder(Decoder):
    """SmolLM3 leaves rotary positions out of some blocks; their CASA layers have none either."""

    def rotaries(self, blocks: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Rotary | None]:
        rotary = self._rotary(device, dtype)
        return [rotary if self.attention(block).use_rope else None for block in blocks]


class Gemma3Decoder(Decoder):
    """Gemma 3: gains are stored less one, attention and feed-forward have norms behind them too, and local blocks
    have rotary positions of another base than global ones. A CASA window is not cut by a block's sliding window.
    """

    post_norm: ClassVar[str | None] = "post_attention_layernorm"

    def image_norm(self, block: int) -> ImageNorm:
        norm: Any = self.blocks[block].get_submodule("input_layernorm")
        return ImageNorm(1.0 + norm.weight, norm.eps)

    def feed_forward(self, block: int, tokens: Tensor) -> Tensor:
        inner = self.blocks[block].get_submodule
        return inner("post_feedforward_layernorm")(inner("mlp")(inner("pre_feedforward_layernorm")(tokens)))

    def rotaries(self, blocks: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Rotary | None]:
        kinds = [str(self.attention(block).layer_type) for block in blocks]
        made = {kind: self._rotary(device, dtype, layer_type=kind) for kind in set(kinds)}
        return [made[kind] for kind in kinds]

    def logits(self, hidden: Tensor) -> Tensor:
        logits, cap = super().logits(hidden), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap
