"""Models and packed batches to train for a measurement: random weights, random pictures, the same for every method.

Shapes: T text tokens, N image tokens, n samples of one picture each, P patches, c channels of a patch.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa.analysis.shapes import shapes_of
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, FusionConfig, adapt
from casa.models.modeling_casa import new_backbone
from casa.vision import new_encoder

TINY = "tiny"
METHODS = {
    "casa": FusionConfig(),
    "before": FusionConfig(placement="before"),
    "replace": FusionConfig(placement="replace", every=4),
    "update_images": FusionConfig(update_images=True),
    "cross_attention": FusionConfig(method="cross_attention"),
    "insertion": FusionConfig(method="insertion"),
}
LOSS_CHUNK = 1024


@dataclass(frozen=True)
class Case:
    """One training step to measure. method: a name of `METHODS`. shape: tiny, or a name of `casa.analysis.shapes`.
    samples: in the row, of one picture each. frozen_tower: its tokens are made without gradients."""

    method: str
    image_tokens: int
    text_tokens: int = 256
    samples: int = 4
    shape: str = TINY
    device: str = "cpu"
    checkpoint_blocks: bool = False
    frozen_tower: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}; give one of: {', '.join(METHODS)}.")
        if self.samples < 1 or self.image_tokens % self.samples or self.text_tokens % self.samples:
            raise UserError(f"give image and text tokens in multiples of {self.samples}, the samples of a row.")
        if self.image_tokens < self.samples or self.text_tokens < 2 * self.samples:
            raise UserError("give every sample a picture of one token or more, and two text tokens or more.")


def fresh_model(
    method: str, shape: str = TINY, device: str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> CasaForConditionalGeneration:
    """A model of that shape with random weights, all to be trained. method: a name of `METHODS`.

    dtype: bf16 for published shapes if left out.
    """
    text, tower = _tiny() if shape == TINY else shapes_of(shape, published=True)
    dtype = dtype if dtype is not None else torch.float32 if shape == TINY else torch.bfloat16
    usual = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            backbone = new_backbone(copy.deepcopy(text))
            encoder = None if tower is None else new_encoder(copy.deepcopy(tower))
            model = adapt(backbone, METHODS[method], vision=encoder)
    finally:
        torch.set_default_dtype(usual)
    model.requires_grad_(True)
    model.loss_chunk = LOSS_CHUNK
    return model.train()


def packed_batch(case: Case, model: CasaForConditionalGeneration) -> dict[str, Tensor]:
    """The case's samples in one row, every picture before its sample's text: what `model` takes, labels included."""
    generator = torch.Generator().manual_seed(case.seed)
    rows, columns = most_square(case.image_tokens // case.samples)
    length = case.text_tokens // case.samples
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, case.text_tokens), generator=generator)
    batch = {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.arange(length).repeat(case.samples)[None],
        "image_positions": torch.tensor([(0, length * number) for number in range(case.samples)]),
        **random_pictures(model, [(rows, columns)] * case.samples, generator),
    }
    return {name: value.to(case.device) for name, value in batch.items()}


def random_pictures(
    model: CasaForConditionalGeneration, grids: list[tuple[int, int]], generator: torch.Generator
) -> dict[str, Tensor]:
    """`pixel_values` (P, c) and `image_grid_thw` (n, 3) of pictures of (rows, columns) tokens each."""
    config: Any = model.config.encoder_config
    merge = config.spatial_merge_size
    channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = sum(rows * columns for rows, columns in grids) * merge**2
    return {
        "pixel_values": torch.randn(patches, channels, generator=generator),
        "image_grid_thw": torch.tensor([(1, merge * rows, merge * columns) for rows, columns in grids]),
    }


def most_square(tokens: int) -> tuple[int, int]:
    """Rows and columns of so many tokens, as square as their number allows."""
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return rows, tokens // rows


def _tiny() -> tuple[Any, Any]:
    text = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
    )
    tower = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        patch_size=14,
        temporal_patch_size=1,
        out_hidden_size=128,
        fullatt_block_indexes=[1],
    )
    return text, tower
