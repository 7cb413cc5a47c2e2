"""Scans, their split, digits drawn from them, and the paper under them."""

import numpy as np
import pytest

from casa.evaluation.handwriting import (
    FIRST_HELD_OUT,
    Hand,
    _kin,
    compose,
    draw_paper,
    draw_strength,
    grainy,
    load_scans,
    noise,
    pick_scan,
    render_digits,
    scan_indices,
)


def render_digit(scan, height, rng, hand=None, strength=0.0):
    return render_digits([scan], [height], rng, hand, strength)[0]


def test_scans_are_scikit_learns():
    scans, digits = load_scans()
    assert scans.shape == (1797, 8, 8)
    assert scans.max() == 16
    assert set(digits) == set(range(10))


def test_splits_are_disjoint_and_whole():
    train = np.concatenate([scan_indices("train", d) for d in range(10)])
    held_out = np.concatenate([scan_indices("held_out", d) for d in range(10)])
    assert train.max() == FIRST_HELD_OUT - 1
    assert held_out.min() == FIRST_HELD_OUT
    assert sorted([*train, *held_out]) == list(range(1797))


def test_picked_scan_shows_the_digit():
    rng = np.random.default_rng(0)
    _, digits = load_scans()
    for digit in range(10):
        scan = pick_scan(digit, "held_out", rng)
        assert scan >= FIRST_HELD_OUT
        assert digits[scan] == digit


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("height", [24.0, 41.5, 64.0])
def test_digits_are_about_as_high_as_asked_and_full_of_ink(height, strength):
    drawn = render_digits(np.arange(60), np.full(60, height), np.random.default_rng(0), None, strength)
    for alpha in drawn:
        assert alpha.dtype == np.uint8
        assert 0.7 * height < alpha.shape[0] < 1.35 * height
        assert alpha.shape[1] < 1.4 * height
        assert alpha.max() > 150
        # cropped to the ink: no empty border is left
        assert min(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) > 40


def test_drawing_is_deterministic():
    a = render_digit(5, 40, np.random.default_rng(1), strength=1.0)
    b = render_digit(5, 40, np.random.default_rng(1), strength=1.0)
    np.testing.assert_array_equal(a, b)


def test_strength_bends_the_strokes():
    plain, bent = (render_digit(5, 40, np.random.default_rng(1), Hand(), strength=strength) for strength in (0.0, 1.0))
    assert plain.shape != bent.shape or (plain != bent).any()


def test_upright_digit_resembles_its_scan():
    # drawn upright and shrunk back to 8 x 8, the ink lies where the scan has it
    from PIL import Image

    scans, _ = load_scans()
    for scan in (0, 2, 4, 1401, 1500):
        ink = render_digit(scan, 48, np.random.default_rng(0), Hand(threshold=0.1, sharpness=1.1))
        rows, columns = (np.flatnonzero(scans[scan].any(axis=a)) for a in (1, 0))
        truth = scans[scan][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        small = np.asarray(Image.fromarray(ink).resize(truth.shape[::-1], Image.Resampling.BOX))
        assert np.corrcoef(small.ravel(), truth.ravel())[0, 1] > 0.7


def test_a_leaning_hand_leans_right():
    upright, leaning = (
        render_digit(1, 60, np.random.default_rng(0), Hand(slant=slant)).astype(float) for slant in (0.0, 0.5)
    )

    def lean(ink):
        x = np.arange(ink.shape[1])
        third = ink.shape[0] // 3
        top, bottom = ink[:third].sum(axis=0), ink[-third:].sum(axis=0)
        return (top @ x) / top.sum() - (bottom @ x) / bottom.sum()

    assert lean(leaning) > lean(upright) + 5


def test_nothing_to_draw_gives_nothing():
    assert render_digits([], [], np.random.default_rng(0)) == []


def test_kin_are_of_the_same_digit_and_split_and_not_oneself():
    _, digits = load_scans()
    kin = _kin()
    scans = np.arange(len(digits))[:, None]
    assert (digits[kin] == digits[:, None]).all()
    assert ((kin < FIRST_HELD_OUT) == (scans < FIRST_HELD_OUT)).all()
    assert (kin != scans).all()


def test_strokes_of_training_are_bent_and_those_held_out_are_not():
    rng = np.random.default_rng(0)
    drawn = [draw_strength(None, "train", rng) for _ in range(200)]
    assert 0 <= min(drawn) < 0.1
    assert 1.4 < max(drawn) <= 1.5
    assert draw_strength(None, "held_out", rng) == 0
    assert draw_strength(0.7, "held_out", rng) == 0.7
    assert all(0.4 <= draw_strength((0.4, 2.0), "train", rng) < 2 for _ in range(50))


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
