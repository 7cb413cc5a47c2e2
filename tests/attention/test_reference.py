"""The reference against a softmax over the whole mask, written out here."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.attention import casa_attention


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
@settings(deadline=None)
def test_reference_is_softmax_under_the_mask(tools, data):
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    given_ = tools.tensors(layout)
    got = tools.outcome(lambda *t: casa_attention(*t, layout, attend=attend, impl="reference"), given_)
    want = tools.outcome(lambda *t: whole_mask(*t, layout, attend), given_)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
