"""The reference against a softmax over the whole mask, written out here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.attention import casa_attention
from casa.windows import WindowLayout


def whole_mask(query, text_key, text_value, image_key, image_value, layout, attend):
    """exp, mask, divide: over all keys at once, one query head at a time."""
    mask = layout.mask().double()
    if attend == "image":
        mask[:, layout.num_image :] = 0
    key, value = torch.cat([image_key, text_key]), torch.cat([image_value, text_value])
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        weights = (query[:, head] @ key[:, head // group].T * query.shape[-1] ** -0.5).exp() * mask
        total = weights.sum(1, keepdim=True)
        heads.append(weights @ value[:, head // group] / torch.where(total > 0, total, torch.ones(())))
    return torch.stack(heads, dim=1)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_reference_is_softmax_under_the_mask(tools, data):
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    given_ = tools.tensors(layout)
    got = tools.outcome(lambda *t: casa_attention(*t, layout, attend=attend, impl="reference"), given_)
    want = tools.outcome(lambda *t: whole_mask(*t, layout, attend), given_)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def in_its_dtype(query, text_key, text_value, image_key, image_value, layout):
    """Plain torch: one softmax under the whole mask, in the dtype of what is given."""
    group = query.shape[1] // text_key.shape[1]
    pairs = ((image_key, text_key), (image_value, text_value))
    key, value = (torch.cat(pair).repeat_interleave(group, dim=1) for pair in pairs)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~layout.mask(), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_lower_precision_is_kept_and_costs_no_more_than_in_plain_torch(tools, dtype):
    layout = WindowLayout.from_insertions([63, 20], [[(0, 40), (17, 9), (17, 5), (50, 1)], [(3, 12)]], history=1)
    given_ = [tensor.detach() for tensor in tools.tensors(layout, D=32, dtype=dtype)]
    found = casa_attention(*given_, layout, impl="reference")
    assert found.dtype == dtype
    exact = casa_attention(*(tensor.double() for tensor in given_), layout, impl="reference")
    error, plain = (float((out.double() - exact).abs().max()) for out in (found, in_its_dtype(*given_, layout)))
    assert 0 < error <= 2 * plain
