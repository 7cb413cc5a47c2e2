"""The Qwen2.5-VL image tower on a batch of pictures of one size: the same function, several times faster.

transformers' forward runs attention picture by picture and window by window in Python. Training draws its
batches from pictures of one size, where all of them go through one call. A test holds the two equal.

Legend: B pictures, P patches per picture, M = P / 4 merged tokens, C tower width, H heads, D head width
    pixels (B, P, 3 * 14 * 14)   patches in transformers' order (four of a merged token in a row)
    grid   (rows, columns)       of patches, not of merged tokens
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


def encode_batch(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Merged tokens (B, M, out_hidden_size) in raster order, as `tower(...).pooler_output` gives them.

    tower: a Qwen2_5_VisionTransformerPretrainedModel of transformers.
    """
    config = tower.config
    batch, patches, _ = pixels.shape
    thw = torch.tensor([[1, *grid]])
    merge = tower.spatial_merge_unit
    order, bounds = get_vision_window_index(
        thw, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    groups = _windows_by_length(bounds.tolist())
    positions = get_vision_position_ids(thw, tower.spatial_merge_size)

    proj = tower.patch_embed.proj
    x = F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1))
    windowed = len(tower.blocks) > len(set(config.fullatt_block_indexes))
    cos, sin = tower.rotary_pos_emb(x, positions)
    if windowed:
        x = _permute(x, order, merge)
        cos, sin = _permute(cos[None], order, merge)[0], _permute(sin[None], order, merge)[0]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    for number, block in enumerate(tower.blocks):
        full = number in config.fullatt_block_indexes
        x = x + _attend(block.attn, _rms(block.norm1, x), cos, sin, None if full else groups)
        x = x + block.mlp(_rms(block.norm2, x))

    merger = tower.merger
    x = merger.mlp(_rms(merger.ln_q, x).view(batch, patches // merge, -1))
    return x[:, torch.argsort(order)] if windowed else x


def _permute(x: Tensor, order: Tensor, merge: int) -> Tensor:
    batch, patches, width = x.shape
    return x.view(batch, patches // merge, merge, width)[:, order].reshape(batch, patches, width)


def _rms(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _windows_by_length(bounds: list[int]) -> list[Tensor]:
    """Patch indices of all windows of one length, (windows, length), for each length that occurs."""
    by_length: dict[int, list[Tensor]] = {}
    for start, stop in itertools.pairwise(bounds):
        by_length.setdefault(stop - start, []).append(torch.arange(start, stop))
    return [torch.stack(indices) for indices in by_length.values()]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _attend(attn: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: list[Tensor] | None) -> Tensor:
    batch, patches, width = x.shape
    qkv = attn.qkv(x).view(batch, patches, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = _turn(qkv[:2], cos, sin).unbind(0)  # (B, H, P, D)
    value = qkv[2]
    if windows is None:
        out = F.scaled_dot_product_attention(query, key, value)
    elif len(windows) == 1:
        # equal windows lie one after the other, so they are a view of the whole
        count, length = windows[0].shape
        shape = (batch, attn.num_heads, count, length, -1)
        out = F.scaled_dot_product_attention(query.reshape(shape), key.reshape(shape), value.reshape(shape))
        out = out.reshape(batch, attn.num_heads, patches, -1)
    else:
        pieces = []
        for index in windows:
            q, k, v = query[:, :, index], key[:, :, index], value[:, :, index]
            pieces.append(F.scaled_dot_product_attention(q, k, v).flatten(2, 3))
        back = torch.argsort(torch.cat([index.flatten() for index in windows]))
        out = torch.cat(pieces, dim=2)[:, :, back]
    return attn.proj(out.transpose(1, 2).reshape(batch, patches, width))
