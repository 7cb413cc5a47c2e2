"""A fused model in numbers: its blocks, the tokens of a frame, and the operations of a frame and of a generated token.

All is read off the modules, on the meta device or any other; no weight is looked at. Counted are products of matrices,
at two operations per multiplication, as PyTorch's own counter does. Attention of a queries to b keys over h channels is
4 a b h: scores and sums, masked pairs included. Norms, softmax, activations and rotary positions are left out.

Shapes: d width of the text model, Hq query heads, Hkv key heads, D channels of a head, P patches and N image tokens of
a frame, c cached tokens, w text tokens of the open window (both with the new one), q learned queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration
from casa.models.adapt import encoder_blocks
from casa.models.backbones import InsertionVLM
from casa.models.cache import TextCache
from casa.models.inputs import count_tokens
from casa.vision import extra_depths, spec_of
from casa.vision.connector import PixelShuffle, QFormer

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
class BlockShape:
    """One block of the text model.

    Attributes:
        query, key: Hq * D, and Hkv * D, which is also the width of a value.
        query_out, key_value, feed_forward: Weights of q_proj and o_proj, of k_proj and v_proj, of all other matrices.
        span: Text tokens its self-attention sees, None for all.
        fused: Whether it has a fusion layer.
        caches: Whether it has keys and values in the text model's cache.
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

    def seen(self, tokens: int) -> int:
        """Of so many tokens, those that the block's self-attention looks at."""
        return tokens if self.span is None else min(tokens, self.span)


@dataclass(frozen=True)
class FrameShape:
    """One frame on its way: patches into the tower, tokens out of it, tokens that the text model is given.

    Attributes:
        rows, columns: In patches.
        connected: n, tokens of the tower, or of the connector that folds them.
        tokens: N, after the compressor.
    """

    rows: int
    columns: int
    connected: int
    tokens: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def blocks_of(model: CasaForConditionalGeneration) -> list[BlockShape]:
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
            BlockShape(
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

    Raises:
        UserError: The picture is less than one token.
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


def attention_flops(queries: int, keys: int, channels: int) -> int:
    """4 * queries * keys * channels (all heads together)."""
    return 4 * queries * keys * channels


def tower_flops(encoder: nn.Module, frame: FrameShape) -> int:
    """2 P * weights(patch embedding, blocks) + 2 N * weights(merger) + the blocks' attention.

    Attention of a block: 4 * width * sum of n * n over the windows of n patches that it looks at: all P at once, or
    (Qwen2.5-VL, but for its full blocks) squares of `window_size` pixels, smaller at the edges. Pooling heads of
    SigLIP, which casa does not run, are left out, and so is the position table. An encoder that is no transformer
    counts for itself.
    """
    config: Any = encoder.config
    if (own := spec_of(config).flops) is not None:
        return own(encoder, frame.rows, frame.columns)
    mergers = [part for name, part in encoder.named_children() if "merger" in name]
    pooling = getattr(encoder, "head", None) or getattr(getattr(encoder, "vision_model", None), "head", None)
    late = sum(map(matrix_weights, mergers))
    early = matrix_weights(encoder) - late - matrix_weights(pooling)
    merged = frame.patches // spec_of(config).merge(config) ** 2
    width = tower_width(config)
    blocks = encoder_blocks(encoder)
    full = getattr(config, "fullatt_block_indexes", None)
    pairs = 0
    for index in range(len(blocks)):
        whole = full is None or index in full
        pairs += frame.patches**2 if whole else _window_pairs(frame, config.window_size // config.patch_size)
    return 2 * frame.patches * early + 2 * merged * late + 4 * width * pairs


def _window_pairs(frame: FrameShape, side: int) -> int:
    """Sum of n * n over squares of `side` patches, cut off at the edges."""

    def parts(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    return sum((rows * columns) ** 2 for rows in parts(frame.rows) for columns in parts(frame.columns))


def connect_flops(model: CasaForConditionalGeneration, frame: FrameShape) -> int:
    """FLOPs between tower and text model: 2 n * weights(projector or connector), and the compressor's.

    Times the feature sets that the tower hands out. n is the number of the tower's tokens; where a VLM's connector
    folds them, of the folded ones. Pooling is no product. Pixel-shuffle takes 2 N * weights; a Q-Former of inner width
    e, over n tokens, 2 n * weights(what n tokens pass: entrance, place, keys and values) + 2 q * weights(the rest) +
    blocks * 4 e q (q + n).

    Args:
        model: On any device, meta too.
        frame: The picture, in tokens.
    """
    compressor: Any = getattr(model, "compressor", None)
    decoder, before = model.decoder, frame.connected
    # a VLM's connector is what is neither in its tower nor in its text model or head
    apart = [decoder.stack, model.backbone.get_output_embeddings()]
    apart += [decoder.tower] if isinstance(decoder, InsertionVLM) else []
    connector = matrix_weights(model.backbone) - sum(map(matrix_weights, apart))
    total = 2 * before * (connector + matrix_weights(getattr(model, "projector", None)))
    if isinstance(compressor, PixelShuffle):
        total += 2 * frame.tokens * matrix_weights(compressor)
    elif isinstance(compressor, QFormer):
        queries, inner = compressor.queries.shape
        passed: list[Any] = [compressor.enter, compressor.place]
        passed += [block.look_at_image.key_value for block in compressor.blocks]  # type: ignore[union-attr]
        by_token = sum(map(matrix_weights, passed))
        total += 2 * before * by_token + 2 * queries * (matrix_weights(compressor) - by_token)
        total += len(compressor.blocks) * attention_flops(queries, queries + before, inner)
    return total * (1 + extra_depths(model.config.encoder_config))


def image_flops(model: CasaForConditionalGeneration, blocks: Sequence[BlockShape], tokens: int, before: int) -> int:
    """What the text model does with a frame's N tokens, with `before` tokens cached already.

    CASA and cross-attention: every fusion layer's keys and values, 2 N * weights(k_proj, v_proj); with `update_images`
    also 2 N * weights(feed-forward) of all blocks ahead of the last fusion layer.
    Insertion: every block whole, 2 N * weights(block), and its attention, 4 N (before + N) Hq D.
    """
    if model.fusion.method == "insertion":
        return sum(
            2 * tokens * block.matrices + attention_flops(tokens, block.seen(before + tokens), block.query)
            for block in blocks
        )
    total = sum(2 * tokens * block.key_value for block in blocks if block.fused)
    if model.fusion.update_images:
        total += sum(2 * tokens * block.feed_forward for block in blocks[: max(model.fused_blocks)])
    return total


def frame_flops(model: CasaForConditionalGeneration, frame: FrameShape, before: int) -> int:
    """Tower, connector and compressor, and the text model's share; `before`: tokens cached already (insertion only)."""
    own = tower_flops(model.encoder, frame) + connect_flops(model, frame)
    return own + image_flops(model, blocks_of(model), frame.tokens, before)


def token_flops(model: CasaForConditionalGeneration, cached: int, window: int, images: int) -> int:
    """One generated token. cached: c (under insertion with the images). window: w. images: image tokens it sees.

    2 * weights(blocks, head) + per block with self-attention 4 c Hq D + per fusion layer
    2 * weights(q_proj, o_proj, and k_proj, v_proj if text is a key) + 4 (images + w if text is a key) Hq D.
    Under "replace" the layer's projections are the block's own, and there is no self-attention.
    """
    blocks, fusion = blocks_of(model), model.fusion
    total = 2 * matrix_weights(model.backbone.get_output_embeddings())
    text_is_key = fusion.attend == "both"
    for block in blocks:
        total += 2 * block.matrices
        if block.caches:
            total += attention_flops(1, block.seen(cached), block.query)
        if block.fused:
            own = block.query_out + (block.key_value if text_is_key else 0)
            if fusion.placement == "replace":
                # already counted with the block, but for keys and values that plain cross-attention does not take
                own -= block.query_out + block.key_value
            keys = images + (window if text_is_key else 0)
            total += 2 * own + attention_flops(1, keys, block.query)
    return total
