"""What each variant computes, written out by hand for one row: the paper's sections 2, 3 and 5 against the model.

Shapes: T tokens of text, N image tokens, d width, Hq query heads, Hkv key heads, D channels of a head.

Nothing of casa is used but the mask of `WindowLayout` (tests/test_windows.py has its own definition) and the image
tower; modules of the backbone are called one at a time. Gist tokens and compressors are not here.
"""

import copy

import pytest
import torch
from torch import nn

from casa import WindowLayout
from casa.testing import tiny_casa

BASE = 10_000.0


class ExactRotary(nn.Module):
    """Llama's rotary positions in float64: with transformers' own, in float32, only distances of 1e-7 are the same."""

    def forward(self, x, position_ids):
        angles = turns(position_ids.double(), 8)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def turns(positions, width):
    """(..., D) angles: channels c and c + D / 2 turn together, slower the higher c is."""
    speeds = BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat([positions[..., None] * speeds] * 2, dim=-1)


def turned(x, positions):
    """x (T, H, D) at its positions (T,)."""
    angles = turns(positions.double(), x.shape[-1])[:, None]
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


def attended(query, key, value, seen):
    """(T, Hq * D): one softmax over the keys that `seen` (T, keys) allows, zeros where it allows none."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, value).flatten(1)


def heads(linear, x):
    return linear(x).unflatten(-1, (-1, 8))


def self_attention(block, h):
    own, at = block.self_attn, torch.arange(len(h))
    query, key = turned(heads(own.q_proj, h), at), turned(heads(own.k_proj, h), at)
    causal = torch.ones(len(h), len(h), dtype=torch.bool).tril()
    return own.o_proj(attended(query, key, heads(own.v_proj, h), causal))


def casa(weights, gate, h, image, layout, fusion):
    """CASA(h) (T, d), h and image tokens (N, d) being normed already; positions are those of the whole text."""
    query, seen = heads(weights.q_proj, h), layout.mask()
    key, value = heads(weights.k_proj, image), heads(weights.v_proj, image)
    if fusion.method == "casa":
        text, places = torch.arange(len(h)), layout.image_text_index
        query = turned(query, text)
        key = torch.cat([turned(key, places), turned(heads(weights.k_proj, h), text)])
        value = torch.cat([value, heads(weights.v_proj, h)])
    else:
        seen = seen[:, : len(image)]
    update = weights.o_proj(attended(query, key, value, seen))
    return update if gate is None else update * torch.tanh(gate)


def by_hand(model, sample):
    """Logits (T, V) of a fused llama."""
    fusion, inputs = model.fusion, sample.inputs()
    grids = [(rows, columns) for _, rows, columns in sample.pictures]
    image = model.projector(model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]), grids)
    places = [(place, rows * columns) for place, rows, columns in sample.pictures]
    layout = WindowLayout.from_insertions([len(sample.ids)], [places], fusion.split, fusion.history)
    sees_image = layout.mask()[:, : len(image)].any(1)[:, None]
    stack = model.backbone.model
    x = stack.embed_tokens(inputs["input_ids"][0])
    for number, block in enumerate(stack.layers):

        def update(h, block=block, number=number, image=image):
            own = not (fusion.share_weights or fusion.placement == "replace")
            layer = model.casa_layers[str(number)] if own else block.self_attn
            gate = layer.gate if fusion.gate else None
            found = casa(layer, gate, h, block.input_layernorm(image), layout, fusion)
            # standing in for self-attention, the layer gives text its window's text, images or not
            return found if fusion.placement == "replace" and fusion.method == "casa" else found * sees_image

        if number not in model.fused_blocks:
            x = x + self_attention(block, block.input_layernorm(x))
        elif fusion.placement == "parallel":
            h = block.input_layernorm(x)
            x = x + self_attention(block, h) + update(h)
        elif fusion.placement == "before":
            x = x + update(block.input_layernorm(x))
            x = x + self_attention(block, block.input_layernorm(x))
        else:
            x = x + update(block.input_layernorm(x))
        x = x + block.mlp(block.post_attention_layernorm(x))
        if fusion.update_images:
            image = image + block.mlp(block.post_attention_layernorm(image))
    return model.backbone.lm_head(stack.norm(x))


def check(model, samples, close):
    model = copy.deepcopy(model)
    model.backbone.model.rotary_emb = ExactRotary()
    for sample in (samples[0], samples[2]):
        close(model(**sample.inputs()).logits[0], by_hand(model, sample))


@pytest.mark.slow
@torch.no_grad()
def test_the_model_is_what_the_paper_writes(fused, samples, close):
    check(fused, samples, close)


@pytest.mark.parametrize("method", ["casa", "cross_attention"])
@torch.no_grad()
def test_images_updated_by_the_blocks_are_what_the_paper_writes(method, samples, close):
    check(tiny_casa(update_images=True, method=method), samples, close)
