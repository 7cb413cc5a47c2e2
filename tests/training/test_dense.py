"""Batches of the tower's stage: of which sizes, and how many pictures."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from casa.training import Sources
from casa.training.dense import DenseBatches
from casa.training.recipe import Optimisation, Sizes, TowerStage


def blank(rng, size):
    cells = np.zeros((size[0] // 28, size[1] // 28), dtype=np.int64)
    return SimpleNamespace(image=Image.new("RGB", size[::-1]), dense={"shade": cells})


def test_a_span_of_the_stage_may_have_more_patches_a_step():
    spans = (Sizes(0.5, 56, 56), Sizes(1.0, 84, 84, patches=360))
    stage = TowerStage({}, Optimisation(steps=8), {"blank": 1.0}, spans, {"shade": 1.0}, patches=128)
    batches = DenseBatches(Sources({"blank": blank}), stage, seed=1)
    assert [batches(step).patches.shape[:2] for step in (0, 3, 4, 7)] == [(8, 16), (8, 16), (10, 36), (10, 36)]
