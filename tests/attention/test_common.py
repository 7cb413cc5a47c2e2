"""Picking rows by index, forward and backward, against torch's own indexing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.attention.common import RowGather


@given(st.data())
@settings(deadline=None)
def test_gradient_is_that_of_indexing(data):
    sources = data.draw(st.integers(1, 6))
    index = torch.tensor(data.draw(st.lists(st.integers(0, sources - 1), min_size=1, max_size=12)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index))))
    source = torch.randn(sources, 2, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(index), 2, 3, dtype=torch.float64) * valid[:, None, None]
    picked = RowGather.of(index, valid, sources)(source)
    assert torch.equal(picked, source[index])
    (mine,) = torch.autograd.grad(picked, source, upstream)
    (theirs,) = torch.autograd.grad(source[index], source, upstream)
    torch.testing.assert_close(mine, theirs)


def test_blank_rows_are_zero_and_hand_no_gradient_back():
    pick = RowGather.of(torch.tensor([1, 0]), torch.tensor([True, False]), 2, blank=torch.tensor([1]))
    source = torch.tensor([[torch.nan], [2.0]], requires_grad=True)
    picked = pick(source)
    assert picked.tolist() == [[2.0], [0.0]]
    (grad,) = torch.autograd.grad(picked, source, torch.tensor([[1.0], [torch.nan]]))
    assert grad.tolist() == [[0.0], [1.0]]
