"""A fused model in numbers: how wide its blocks are, and how many tokens a frame becomes. No weight is looked at.

Shapes: d width of the text model, Hq query heads, Hkv key heads, D channels of a head, N image tokens of a frame.

Everything is read off the modules, on the meta device or any other, so that no formula repeats a model's structure.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.models.backbones import InsertionVLM
from casa.models.cache import TextCache
from casa.models.image_tokens import count_tokens
from casa.vision import extra_depths, spec_of

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrix_weights(module: nn.Module | None) -> int:
    """Weights of all linear layers and convolutions in a module: its multiplications per token."""
    if module is None:
        return 0
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, MATRICES))


def matrix_features(module: nn.Module) -> int:
    """What goes into the linear layers of a module and what comes out, in numbers for each token."""
    return sum(part.in_features + part.out_features for part in module.modules() if isinstance(part, nn.Linear))


def tower_width(config: Any) -> int:
    """Channels inside an image tower; Qwen2-VL calls what it ends in `hidden_size`."""
    return getattr(config, "embed_dim", None) or config.hidden_size


@dataclass(frozen=True)
class Block:
    """One block of the text model.

    query: Hq * D. key: Hkv * D, as wide as a value. query_out: weights of q_proj and o_proj. key_value: of k_proj and
    v_proj. feed_forward: of all its other matrices. span: text tokens its self-attention sees, None for all.
    fused: whether it has a fusion layer. caches: whether it has keys and values in the text model's cache.
    """

    query: int
    key: int
    query_out: int
    key_value: int
    feed_forward: int
    span: int | None
    fused: bool
    caches: bool

    @property
    def matrices(self) -> int:
        return self.query_out + self.key_value + self.feed_forward


@dataclass(frozen=True)
class FrameShape:
    """One frame on its way: patches into the tower, tokens out of it, tokens that the text model is given.

    rows, columns: in patches. connected: n, tokens of the tower, or of the connector that folds them. tokens: N, after
    the compressor.
    """

    rows: int
    columns: int
    connected: int
    tokens: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def blocks_of(model: CasaForConditionalGeneration) -> list[Block]:
    """The text model's blocks."""
    decoder, fusion = model.decoder, model.fusion
    cache = TextCache(model.config.get_text_config(decoder=True))
    found = []
    for index, block in enumerate(decoder.blocks):
        attention = decoder.attention(index)
        q, k, v, o = (attention.get_submodule(f"{name}_proj") for name in "qkvo")
        query_out, key_value = (sum(map(matrix_weights, pair)) for pair in ((q, o), (k, v)))
        fused = index in model.fused_blocks
        slides = index < len(cache.layers) and getattr(cache.layers[index], "is_sliding", False)
        found.append(
            Block(
                query=q.out_features,  # type: ignore[arg-type]
                key=k.out_features,  # type: ignore[arg-type]
                query_out=query_out,
                key_value=key_value,
                feed_forward=matrix_weights(block) - query_out - key_value,
                span=cache.layers[index].sliding_window if slides else None,  # type: ignore[union-attr]
                fused=fused,
                caches=not (fused and fusion.placement == "replace"),
            )
        )
    return found


def frame_of(model: CasaForConditionalGeneration, height: int, width: int) -> FrameShape:
    """What a picture of `height` x `width` pixels becomes, as the processors have it but for their bounds on size.

    Towers of one size take it at theirs.

    Raises UserError for a picture of less than one token.
    """
    config = model.config.encoder_config
    rows, columns = _patches(config, height, width)
    merge = spec_of(config).merge(config)
    grids = [(rows // merge, columns // merge)]
    if not min(grids[0]):
        raise UserError(f"a picture of {height} x {width} pixels is less than one image token; give a larger one.")
    connected, final = count_tokens(model.joined_grids(grids)), count_tokens(model.final_grids(grids))
    return FrameShape(rows, columns, connected, final)


def _patches(config: Any, height: int, width: int) -> tuple[int, int]:
    family = spec_of(config)
    if family.image_processor is not None:
        return family.image_processor(config, None).patch_grid(height, width)
    patch = config.patch_size
    if family.pictures == "squares":
        return (config.image_size // patch,) * 2
    if family.pictures == "flexible":
        # about as many patches as the tower has places, whatever the picture's size
        from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

        fitted = get_image_size_for_max_num_patches(height, width, patch, config.num_patches)
        return fitted[0] // patch, fitted[1] // patch
    merged = patch * family.merge(config)
    return tuple(round(side / merged) * family.merge(config) for side in (height, width))  # type: ignore[return-value]


def feature_sets(model: CasaForConditionalGeneration) -> int:
    """1 + k: how many sets of tokens the tower hands out, of which each is connected and compressed."""
    return 1 + extra_depths(model.config.encoder_config)


def connector_weights(model: CasaForConditionalGeneration) -> int:
    """Matrix weights between a VLM's tower and its text model: what is in neither, nor in the head."""
    decoder = model.decoder
    inside = [decoder.stack, model.backbone.get_output_embeddings()]
    if isinstance(decoder, InsertionVLM):
        inside.append(decoder.tower)
    return matrix_weights(model.backbone) - sum(map(matrix_weights, inside))
