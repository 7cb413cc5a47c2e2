"""The batched tower is transformers' tower: outputs and gradients, with windows of every shape."""

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from casa.training.tower import new_tower
from casa.training.tower_batch import encode_batch


def _tower(full: list[int]) -> Qwen2_5_VisionTransformerPretrainedModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 24,
        "window_size": 112,
    }
    return new_tower({**settings, "fullatt_block_indexes": full}).double()


# a window is 8 x 8 patches: whole windows, a single one, ragged edges on one and on both sides
@pytest.mark.parametrize("grid", [(16, 8), (4, 6), (8, 10), (18, 20)])
@pytest.mark.parametrize("full", [[0, 1, 2], [1], []])
def test_equal_to_transformers(grid: tuple[int, int], full: list[int]) -> None:
    tower = _tower(full)
    pixels = torch.randn(2, grid[0] * grid[1], 588, dtype=torch.float64)
    weight = torch.randn(2 * grid[0] * grid[1] // 4, 24, dtype=torch.float64)
    found = []
    for run in (
        lambda: tower(pixels.flatten(0, 1), grid_thw=torch.tensor([[1, *grid]] * 2)).pooler_output,
        lambda: encode_batch(tower, pixels, grid).flatten(0, 1),
    ):
        tower.zero_grad()
        out = run()
        (out * weight).sum().backward()
        found.append((out.detach(), {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}))
    (wanted, gradients), (got, own) = found
    # transformers computes rotary angles and their products in float32, whatever the weights' dtype
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == own.keys()
    for name in gradients:
        torch.testing.assert_close(own[name], gradients[name], rtol=1e-4, atol=1e-4, msg=name)
