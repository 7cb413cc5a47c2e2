"""Training and evaluation never share a random stream."""

import numpy as np
import pytest

from casa.evaluation.seeds import as_generator, generator


def test_every_task_split_seed_and_substream_has_its_own_numbers():
    names = [
        (task, split, seed, *more)
        for task in ("pages", "scenes", "stream", "sheets")
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
