"""Decoder: what the fusion asks of a causal language model of transformers, answered for Llama and its like.

Shapes: B rows, L tokens, T packed tokens, N image tokens, d width, D channels of a head, V vocabulary.

A family that differs overrides what differs. Blocks must take the text in through `input_layernorm` (root mean
square and one gain) and have a `self_attn` with the projections q, k, v and o.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from casa.errors import UserError
from casa.layers import ImageNorm, Rotary, Rotation


@dataclass(frozen=True)
class Decoder:
    """Views into a causal language model; owns nothing.

    Attributes:
        stack_at: Where the model keeps its embeddings, blocks and rotary positions.
        rotary_axes: 1, or 3 for rotary positions of time, row and column (mRoPE).
        rotary_neighbours: See `Rotation`.
        post_norm: Name of the block's norm over what self-attention gives, if it has one. A CASA update goes through it
            as well, so that it comes in the scale that the rest of the block expects.
        key_map: (regular expression, replacement): from names of the published checkpoints to those of the model.
    """

    stack_at: ClassVar[str] = "model"
    rotary_axes: ClassVar[int] = 1
    rotary_neighbours: ClassVar[bool] = False
    post_norm: ClassVar[str | None] = None
    key_map: ClassVar[tuple[tuple[str, str], ...]] = ()

    model: nn.Module

    @property
    def config(self) -> Any:
        """The config of the text model."""
        return self.model.config.get_text_config()  # type: ignore[union-attr,operator]

    @property
    def stack(self) -> nn.Module:
        """The text model without its head: embeddings, blocks, last norm."""
        return self.model.get_submodule(self.stack_at)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        """Of the text model's embeddings, and so of the text."""
        return self.embedding.weight.dtype

    @property
    def blocks(self) -> nn.ModuleList:
        return self.stack.get_submodule("layers")  # type: ignore[return-value]

    def check(self) -> None:
        """Raises UserError if the blocks are not what the adapter takes them for."""
        for index, block in enumerate(self.blocks):
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
                if not _has(block, name):
                    raise UserError(
                        f"block {index} of this {self.model.config.model_type!r} model has no {name}, which a CASA "  # type: ignore[union-attr]
                        "layer is built from; leave such blocks out of the model, or add an adapter for it."
                    )

    def attention(self, block: int) -> nn.Module:
        return self.blocks[block].get_submodule("self_attn")

    def image_norm(self, block: int) -> ImageNorm:
        """The norm that text enters the block's attention through, for image tokens."""
        norm = self.blocks[block].get_submodule("input_layernorm")
        return ImageNorm(norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]

    def feed_forward(self, block: int, tokens: Tensor) -> Tensor:
        """What the block's feed-forward network, norms included, adds to tokens (N, d)."""
        inner = self.blocks[block]
        return inner.get_submodule("mlp")(inner.get_submodule("post_attention_layernorm")(tokens))

    def rotaries(self, blocks: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Rotary | None]:
        """The rotary positions of these blocks; the same object where they are the same, None where there are none."""
        rotary = self._rotary(device, dtype)
        return [rotary for _ in blocks]

    def _rotary(self, device: torch.device, dtype: torch.dtype, **choice: Any) -> Rotary:
        module = self.stack.get_submodule("rotary_emb")
        like = torch.empty(0, device=device, dtype=dtype)

        def rotation(positions: Tensor) -> Rotation:
            positions = positions.to(device)
            # text has the same position on every axis
            axes = positions.expand(self.rotary_axes, -1)[:, None] if self.rotary_axes > 1 else positions[None]
            cos, sin = module(like, axes, **choice)
            if self.rotary_neighbours:
                half = cos.shape[-1] // 2
                cos, sin = (x[..., :half].repeat_interleave(2, dim=-1) for x in (cos, sin))
            return Rotation(cos[0], sin[0], self.rotary_neighbours)

        return rotation

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """`position_ids` (B, L) of text alone, as the stack wants them."""
        if self.rotary_axes == 1:
            return position_ids
        # the first row is what packed samples are told apart by
        return position_ids[None].expand(1 + self.rotary_axes, -1, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, L, V) from the stack's output (B, L, d)."""
        return self.model.get_output_embeddings()(hidden)  # type: ignore[operator]


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
