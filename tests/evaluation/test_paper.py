"""Paper, ink on it, and the camera's noise."""

import numpy as np
import pytest

from casa.evaluation.paper import compose, draw_paper, grainy, noise


def test_noise_has_unit_deviation_and_no_offset():
    grain = noise(200, 300, np.random.default_rng(0))
    assert grain.shape == (3, 200, 300)
    assert abs(grain.std() - 1) < 0.05
    assert abs(grain.mean()) < 0.05


def test_noise_differs_between_draws():
    rng = np.random.default_rng(0)
    assert (noise(50, 50, rng) != noise(50, 50, rng)).any()


def test_too_large_noise_is_refused():
    with pytest.raises(ValueError, match="at most 1024 px"):
        noise(1025, 10, np.random.default_rng(0))


def test_paper_is_light():
    for seed in range(20):
        paper = draw_paper(112, 140, np.random.default_rng(seed))
        assert paper.shape == (3, 112, 140)
        assert paper.mean() > 170


def test_full_ink_covers_paper_and_no_ink_leaves_it():
    paper = np.full((3, 2, 2), 200, np.float32)
    alpha = np.array([[255, 0], [0, 255]], np.uint8)
    ink = np.array([10, 20, 30], np.float32)
    picture = np.asarray(compose(paper, alpha, ink, paper, 0.0))
    assert picture[0, 0].tolist() == [10, 20, 30]
    assert picture[0, 1].tolist() == [200, 200, 200]


def test_grain_never_wraps_around():
    picture = np.array([[[0, 128, 255]]], np.uint8)
    grain = np.array([-1, 0, 1], np.float32).reshape(3, 1, 1)
    assert np.asarray(grainy(picture, grain, 50.0)).tolist() == [[[0, 128, 255]]]
