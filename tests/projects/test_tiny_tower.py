"""The tower's stage: its loss and its batches, and patches and pictures as transformers cuts and encodes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from casa.errors import UserError
from projects.casa_tiny.chat import build_tokenizer
from projects.casa_tiny.recipe import Optimisation, Sizes, TowerStage
from projects.casa_tiny.tower import dense_loss, draw_batch, encode_batch, new_tower, patchify, to_pixels
from projects.casa_tiny.train import make_processor

EMPTY = 10  # the class of `digit` that means "nothing here"


def loss(logits, target):
    return dense_loss({"digit": logits}, {"digit": target}, {"digit": 2.0}, smoothing=0.1)


def test_unsaid_cells_do_not_change_the_loss():
    logits = torch.randn(2, 5, 11, dtype=torch.float64)
    target = torch.tensor([[0, 1, EMPTY, EMPTY, 2], [EMPTY, EMPTY, 0, 1, EMPTY]])
    more = torch.cat([logits, torch.randn(2, 3, 11, dtype=torch.float64)], dim=1)
    unsaid = torch.cat([target, torch.full((2, 3), -100)], dim=1)
    torch.testing.assert_close(loss(more, unsaid), loss(logits, target), rtol=1e-12, atol=0)


def test_a_channel_of_which_nothing_is_said_costs_nothing():
    logits = torch.randn(1, 4, 11, requires_grad=True)
    value = loss(logits, torch.full((1, 4), -100))
    assert value == 0


def test_cells_that_say_something_share_three_quarters():
    logits = torch.randn(1, 4, 11, dtype=torch.float64)
    target = torch.tensor([[1, EMPTY, EMPTY, EMPTY]])
    each = torch.nn.functional.cross_entropy(logits[0], target[0], reduction="none", label_smoothing=0.1)
    expected = 2.0 * (0.75 * each[0] + 0.25 * each[1:].mean())
    torch.testing.assert_close(loss(logits, target), expected, rtol=1e-12, atol=0)


def test_cells_of_an_exact_channel_weigh_the_same():
    logits = torch.randn(1, 8, 11, dtype=torch.float64)
    target = torch.tensor([[1, EMPTY, EMPTY, EMPTY, 2, EMPTY, EMPTY, -100]])
    found = dense_loss({"digit": logits}, {"digit": target}, {"digit": 2.0}, 0.1, exact=("digit",))
    each = torch.nn.functional.cross_entropy(logits[0, :7], target[0, :7], reduction="none")
    torch.testing.assert_close(found, 2.0 * each.sum() / (4 * 2), rtol=1e-12, atol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99))
def test_equal_to_the_processor(rows: int, columns: int, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (28 * rows, 28 * columns, 3), dtype=np.uint8)
    processor = make_processor(build_tokenizer(["1"], 300), 672).image_processor
    wanted = processor(images=[Image.fromarray(picture)], return_tensors="pt")
    assert wanted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    # the processor rounds to float32 in another order; the worst difference seen is 2.4e-7
    torch.testing.assert_close(
        to_pixels(torch.from_numpy(patchify(picture))), wanted["pixel_values"], rtol=0, atol=5e-7
    )


@pytest.mark.parametrize("shape", [(28, 30, 3), (27, 28, 3), (28, 28, 4)])
def test_other_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(np.zeros(shape, dtype=np.uint8))


def tower(**changes):
    torch.manual_seed(0)
    sizes = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 24}
    return new_tower({**sizes, "fullatt_block_indexes": [0, 1, 2], **changes}).double()


@pytest.mark.parametrize("grid", [(16, 8), (4, 6), (10, 12)])
def test_a_batch_is_encoded_as_transformers_encodes_its_pictures(grid):
    net = tower()
    pixels = torch.randn(2, grid[0] * grid[1], 588, dtype=torch.float64)
    weight = torch.randn(2 * grid[0] * grid[1] // 4, 24, dtype=torch.float64)
    found = []
    for run in (
        lambda: net(pixels.flatten(0, 1), grid_thw=torch.tensor([[1, *grid]] * 2)).pooler_output,
        lambda: encode_batch(net, pixels, grid).flatten(0, 1),
    ):
        net.zero_grad()
        out = run()
        (out * weight).sum().backward()
        found.append((out.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}))
    (wanted, gradients), (got, own) = found
    # transformers computes rotary angles and their products in float32, whatever the weights' dtype
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == own.keys()
    for name in gradients:
        torch.testing.assert_close(own[name], gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_towers_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="must name every block"):
        tower(fullatt_block_indexes=[1])
    with pytest.raises(UserError, match=r"tower\.model does not make an image tower"):
        tower(num_heads="two")


def test_a_span_of_the_stage_may_have_more_patches_a_step():
    spans = (Sizes(0.5, 112, 112), Sizes(1.0, 140, 140, patches=300))
    stage = TowerStage({}, Optimisation(steps=8), {"sheets": 1.0}, spans, {"digit": 1.0}, patches=128)
    found = [draw_batch(stage, 1, step) for step in (0, 3, 4, 7)]
    assert [batch["patches"].shape[:2] for batch in found] == [(2, 64), (2, 64), (3, 100), (3, 100)]
    assert [batch["targets"].shape for batch in found] == [(1, 2, 16), (1, 2, 16), (1, 3, 25), (1, 3, 25)]
    assert all(batch["grid"].prod() == batch["patches"].shape[1] for batch in found)
