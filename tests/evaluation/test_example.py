"""Cells, their owners and picture sizes."""

import numpy as np
import pytest

from casa.evaluation.example import DENSE_CHANNELS, draw_size, empty_dense, own_cells


def test_empty_dense_shows_nothing():
    dense = empty_dense(112, 168)
    assert set(dense) == set(DENSE_CHANNELS)
    for name, cells in dense.items():
        assert cells.shape == (4, 6)
        assert cells.dtype == np.int64
        if name not in ("across", "down"):
            assert (cells == (10 if name == "digit" else 0)).all()


def test_every_cell_says_where_it_is():
    dense = empty_dense(504, 84)
    assert dense["down"].tolist() == [[n] * 3 for n in range(1, 19)]
    assert dense["across"].tolist() == [[4, 10, 16]] * 18
    assert empty_dense(672, 672)["across"].max() == DENSE_CHANNELS["across"] - 1 == 18


def test_channels_are_separate_arrays():
    dense = empty_dense(112, 112)
    dense["line"][0, 0] = 1
    assert dense["column"][0, 0] == 0


def test_a_cell_goes_to_the_box_that_covers_most_of_it():
    boxes = np.array([[0.0, 0, 42, 28], [42, 0, 84, 28]])
    centres = np.array([[21.0, 14], [63, 14]])
    # each box covers half of the middle cell: the tie goes to the first, and each owns its centre's cell
    np.testing.assert_array_equal(own_cells(boxes, centres, 2, 3, 0.3), [[0, 0, 1], [-1, -1, -1]])


def test_a_small_thing_still_owns_the_cell_under_its_centre():
    boxes = np.array([[0.0, 0, 27, 28], [27, 0, 29, 28]])
    centres = np.array([[13.0, 14], [28, 14]])
    np.testing.assert_array_equal(own_cells(boxes, centres, 1, 2, 0.3), [[0, 1]])


def test_no_things_own_no_cells():
    assert (own_cells(np.zeros((0, 4)), np.zeros((0, 2)), 2, 3, 0.3) == -1).all()


@pytest.mark.parametrize("size", [(100, 112), (112, 113), (84, 112), (112, 700), (0, 112)])
def test_sizes_outside_the_rules_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 28 from 112 to 672"):
        draw_size(np.random.default_rng(0), [size], 112, 672)


def test_sizes_span_the_whole_range():
    rng = np.random.default_rng(0)
    drawn = np.array([draw_size(rng, None, 112, 672) for _ in range(600)])
    assert drawn.min() == 112
    assert drawn.max() == 672
    assert (drawn % 28 == 0).all()
    assert (drawn[:, 0] != drawn[:, 1]).any()


def test_max_side_bounds_the_draw():
    rng = np.random.default_rng(0)
    assert max(max(draw_size(rng, None, 112, 672, 140)) for _ in range(50)) == 140
