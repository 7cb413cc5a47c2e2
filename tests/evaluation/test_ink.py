"""Scans, their split, and digits drawn from them."""

import numpy as np
import pytest

from casa.evaluation.ink import (
    FIRST_HELD_OUT,
    Hand,
    _kin,
    load_scans,
    pick_scan,
    render_digit,
    render_digits,
    scan_indices,
)


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
