"""Picture sizes, and random numbers: training and evaluation never share a stream of them."""

import numpy as np
import pytest

from casa.evaluation.example import as_generator, draw_size, generator


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


def test_every_task_split_seed_and_substream_has_its_own_numbers():
    names = [
        (task, split, seed, *more)
        for task in ("pages", "scenes", "stream")
        for split in ("train", "held_out")
        for seed in (0, 1, -1, 2**40, -(2**70))
        for more in ((), (1,), (2,))
    ]
    first = {generator(*name).integers(2**62) for name in names}
    assert len(first) == len(names)


def test_same_seed_same_numbers():
    a, b = generator("pages", "train", 3), generator("pages", "train", 3)
    np.testing.assert_array_equal(a.random(5), b.random(5))


def test_a_generator_is_drawn_on_as_it_is():
    rng = np.random.default_rng(0)
    assert as_generator("pages", "train", rng) is rng


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        generator("pages", "test", 0)  # type: ignore[arg-type]
