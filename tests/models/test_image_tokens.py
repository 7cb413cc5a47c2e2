"""Where image tokens stand in their pictures."""

import torch

from casa.models.inputs import count_tokens
from casa.models.passes import ImageTokens


def test_places_are_rows_and_columns_in_reading_order():
    images = ImageTokens(torch.zeros(8, 4), grids=[(2, 3), (1, 2)])
    assert images.rows_and_columns().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 2, 0, 1, 2, 0, 1]]
    assert images.lengths == [6, 2]
    assert count_tokens(images.grids) == 8


def test_no_image_is_fine():
    none = ImageTokens(torch.zeros(0, 4))
    assert none.rows_and_columns().shape == (2, 0)
    assert none.lengths == []
