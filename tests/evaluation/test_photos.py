"""Photographs are at hand without a download, and split."""

import numpy as np
import pytest

from casa.errors import UserError
from casa.evaluation import photos
from casa.evaluation.photos import PHOTOS, photo_crop


def test_no_photograph_is_in_both_splits():
    assert not set(PHOTOS["train"]) & set(PHOTOS["held_out"])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_photograph_opens(split):
    for name in PHOTOS[split]:
        photo = photos._photo(name)
        assert photo.mode == "RGB"
        assert max(photo.size) <= 800


@pytest.mark.parametrize("size", [(448, 448), (112, 448), (448, 112), (112, 112)])
def test_crops_fill_the_picture(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = photo_crop(*size, "held_out", rng)
        assert crop.shape == (*size, 3)
        assert crop.dtype == np.uint8
        assert crop.std() > 0


def test_a_missing_photograph_names_the_remedy():
    with pytest.raises(UserError, match="install scikit-image"):
        photos._photo("no-such-photo.png")
