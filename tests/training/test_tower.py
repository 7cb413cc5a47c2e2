"""The tower's loss: cells that say nothing about a channel are passed over."""

import torch

from casa.training.tower import dense_accuracy, dense_loss

EMPTY = {"digit": 3}


def loss(logits, target):
    return dense_loss({"digit": logits}, {"digit": target}, {"digit": 2.0}, EMPTY, smoothing=0.1)


def test_unsaid_cells_change_neither_loss_nor_accuracy():
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    target = torch.tensor([[0, 1, 3, 3, 2], [3, 3, 0, 1, 3]])
    more = torch.cat([logits, torch.randn(2, 3, 4, dtype=torch.float64)], dim=1)
    unsaid = torch.cat([target, torch.full((2, 3), -100)], dim=1)
    torch.testing.assert_close(loss(more, unsaid), loss(logits, target), rtol=1e-12, atol=0)
    right = dense_accuracy({"digit": logits}, {"digit": target}, EMPTY)
    assert dense_accuracy({"digit": more}, {"digit": unsaid}, EMPTY) == right


def test_a_channel_of_which_nothing_is_said_costs_nothing():
    logits = torch.randn(1, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((1, 4), -100))
    assert value == 0


def test_cells_that_say_something_share_three_quarters():
    logits = torch.randn(1, 4, 4, dtype=torch.float64)
    target = torch.tensor([[1, 3, 3, 3]])
    each = torch.nn.functional.cross_entropy(logits[0], target[0], reduction="none", label_smoothing=0.1)
    expected = 2.0 * (0.75 * each[0] + 0.25 * each[1:].mean())
    torch.testing.assert_close(loss(logits, target), expected, rtol=1e-12, atol=0)


def test_cells_of_an_exact_channel_weigh_the_same():
    logits = torch.randn(1, 8, 4, dtype=torch.float64)
    target = torch.tensor([[1, 3, 3, 3, 2, 3, 3, -100]])
    found = dense_loss({"digit": logits}, {"digit": target}, {"digit": 2.0}, EMPTY, 0.1, exact=("digit",))
    each = torch.nn.functional.cross_entropy(logits[0, :7], target[0, :7], reduction="none")
    torch.testing.assert_close(found, 2.0 * each.sum() / (4 * 2), rtol=1e-12, atol=0)
