"""The moving view: two ways through it agree, and it never leaves the sheet."""

import numpy as np
import pytest

from casa.evaluation.camera import LEAST_ZOOM, Camera

CAMERAS = [Camera.draw(h, w, np.random.default_rng(seed)) for seed, (h, w) in enumerate([(224, 448), (448, 224)])]


@pytest.mark.parametrize("camera", CAMERAS)
def test_to_frame_undoes_to_sheet(camera):
    for t in (0.0, 1.7, 100.0):
        assert camera.to_frame(*camera.to_sheet(13.0, 200.0, t), t) == pytest.approx((13.0, 200.0))


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_view_stays_on_the_sheet(camera):
    height, width = camera.sheet_size
    for t in np.linspace(0, 60, 601):
        for x in (0, camera.width):
            for y in (0, camera.height):
                sheet_x, sheet_y = camera.to_sheet(x, y, float(t))
                assert 0 <= sheet_x <= width
                assert 0 <= sheet_y <= height
        assert LEAST_ZOOM - 1e-9 <= camera.scale(float(t)) <= 1 / LEAST_ZOOM + 1e-9


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_view_moves_but_never_jumps(camera):
    steps = np.array([camera.to_sheet(0, 0, k / 30) for k in range(900)])
    moves = np.linalg.norm(np.diff(steps, axis=0), axis=1)
    assert moves.max() < 4
    assert np.ptp(steps, axis=0).min() > 5
