"""Floating-point operations of a frame and of a generated token, by formula.

Shapes: d width of the text model, P patches and N image tokens of a frame, c cached tokens, w text tokens of the open
window (both with the new one), q learned queries.

Counted are products of matrices, at two operations per multiplication, as PyTorch's own counter does (a test compares
the two). Attention of a queries to b keys over h channels is 4 a b h: scores and sums, masked pairs included. Norms,
softmax, activations and rotary positions are left out.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from casa.analysis.anatomy import (
    Block,
    FrameShape,
    blocks_of,
    connector_weights,
    feature_sets,
    matrix_weights,
    tower_width,
)
from casa.models import CasaForConditionalGeneration
from casa.models.adapt import encoder_blocks
from casa.vision import spec_of
from casa.vision.connector import PixelShuffle, QFormer


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
    """2 n * weights(projector or connector) + the compressor's, times the feature sets that the tower hands out.

    n: the tower's tokens; where a VLM's connector folds them, the folded ones.
    Pooling is no product. Pixel-shuffle: 2 N * weights. Q-Former of inner width e over n tokens:
    2 n * weights(what n tokens pass: entrance, place, keys and values) + 2 q * weights(the rest)
    + blocks * 4 e q (q + n).
    """
    compressor: Any = getattr(model, "compressor", None)
    before = frame.connected
    total = 2 * before * (connector_weights(model) + matrix_weights(getattr(model, "projector", None)))
    if isinstance(compressor, PixelShuffle):
        total += 2 * frame.tokens * matrix_weights(compressor)
    elif isinstance(compressor, QFormer):
        queries, inner = compressor.queries.shape
        passed: list[Any] = [compressor.enter, compressor.place]
        passed += [block.look_at_image.key_value for block in compressor.blocks]  # type: ignore[union-attr]
        by_token = sum(map(matrix_weights, passed))
        total += 2 * before * by_token + 2 * queries * (matrix_weights(compressor) - by_token)
        total += len(compressor.blocks) * attention_flops(queries, queries + before, inner)
    return total * feature_sets(model)


def image_flops(model: CasaForConditionalGeneration, blocks: Sequence[Block], tokens: int, before: int) -> int:
    """What the text model does with a frame's N tokens, with `before` tokens cached already.

    CASA and cross-attention: every fusion layer's keys and values, 2 N * weights(k_proj, v_proj); with `update_images`
    also 2 N * weights(feed-forward) of all blocks ahead of the last fusion layer.
    Insertion: every block whole, 2 N * weights(block), and its attention, 4 N (before + N) Hq D.
    """
    if model.fusion.method == "insertion":
        return sum(
            2 * tokens * block.matrices + attention_flops(tokens, seen(block, before + tokens), block.query)
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
            total += attention_flops(1, seen(block, cached), block.query)
        if block.fused:
            own = block.query_out + (block.key_value if text_is_key else 0)
            if fusion.placement == "replace":
                # already counted with the block, but for keys and values that plain cross-attention does not take
                own -= block.query_out + block.key_value
            keys = images + (window if text_is_key else 0)
            total += 2 * own + attention_flops(1, keys, block.query)
    return total


def seen(block: Block, tokens: int) -> int:
    """Of so many tokens, those that a block's self-attention looks at."""
    return tokens if block.span is None else min(tokens, block.span)
