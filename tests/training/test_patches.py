"""Patches are what transformers' own image processor makes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from casa.training.patches import patchify, to_pixels
from casa.training.tokenizer import build_tokenizer
from casa.training.train import make_processor


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99))
def test_equal_to_the_processor(rows: int, columns: int, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (28 * rows, 28 * columns, 3), dtype=np.uint8)
    processor = make_processor(build_tokenizer(["1"], 300), "Say.", 672).image_processor
    wanted = processor(images=[Image.fromarray(picture)], return_tensors="pt")
    assert wanted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    # the processor rounds to float32 in another order; the worst difference seen is 2.4e-7
    torch.testing.assert_close(to_pixels(patchify(picture)), wanted["pixel_values"], rtol=0, atol=5e-7)


@pytest.mark.parametrize("shape", [(28, 30, 3), (27, 28, 3), (28, 28, 4)])
def test_other_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(np.zeros(shape, dtype=np.uint8))
