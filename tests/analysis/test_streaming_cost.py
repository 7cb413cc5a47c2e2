"""Both sessions see the same frames and take the same steps; insertion's cache grows by images, CASA's does not."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from casa.analysis.streaming_cost import Comparison, compare, insertion_twin
from casa.errors import UserError
from casa.testing import TinySample, tiny_casa, tiny_processor

FRAMES = np.random.default_rng(0).integers(0, 255, (8, 56, 84, 3), dtype=np.uint8)  # 2 x 3 image tokens
TOKEN_BYTES = 3 * 2 * 2 * 8 * 4  # blocks, key and value, key heads, channels, float32


@pytest.fixture(scope="module")
def model():
    return tiny_casa(dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(model):
    return list(compare(model, tiny_processor(), FRAMES, max_new_tokens=3))


def test_image_state_is_constant_and_insertion_grows_by_every_image(rows):
    assert {row.casa.usage.image_tokens for row in rows} == {6}
    assert {row.casa.usage.image_bytes for row in rows} == {6 * TOKEN_BYTES}
    assert [row.insertion.usage.image_tokens for row in rows] == [6 * n for n in range(1, 9)]
    growth = [b.insertion.usage.cache_bytes - a.insertion.usage.cache_bytes for a, b in pairwise(rows)]
    text = [b.casa.usage.text_tokens - a.casa.usage.text_tokens for a, b in pairwise(rows)]
    assert growth == [(6 + new) * TOKEN_BYTES for new in text]


def test_both_say_the_same_number_of_tokens(rows):
    assert [row.casa.usage.text_tokens for row in rows] == [row.insertion.usage.text_tokens for row in rows]
    assert any(row.tokens > 1 for row in rows)
    assert all(row.casa.seconds > 0 and row.insertion.seconds > 0 for row in rows)


@pytest.mark.slow
def test_insertion_is_given_up_at_a_bound(model):
    few = list(compare(model, tiny_processor(), FRAMES[:5], max_new_tokens=2, max_frames=3))
    assert [row.insertion is None for row in few] == [False] * 3 + [True] * 2
    few = list(compare(model, tiny_processor(), FRAMES[:5], max_new_tokens=2, max_image_tokens=12))
    assert [row.insertion is None for row in few] == [False] * 2 + [True] * 3
    few = list(compare(model, tiny_processor(), FRAMES[:3], max_new_tokens=2, max_seconds=1e-9))
    assert [row.insertion is None for row in few] == [False, True, True]


@pytest.mark.slow
def test_text_may_be_bounded_for_casa_alone(model):
    comparison = Comparison(model, tiny_processor(), max_text_tokens=24, max_new_tokens=3)
    rows = [comparison.step(frame) for frame in [*FRAMES, *FRAMES]]
    assert max(row.casa.usage.text_tokens for row in rows) <= 24
    assert rows[-1].insertion is not None
    assert rows[-1].insertion.usage.text_tokens > 24


@pytest.mark.parametrize("fusion", [{}, {"placement": "replace", "every": 2}, {"method": "cross_attention"}], ids=str)
def test_the_twin_has_the_same_weights_and_leaves_the_model_alone(fusion):
    model = tiny_casa(**fusion)
    inputs = TinySample((5, 9, 17, 4), ((1, 2, 2),)).inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        twin = insertion_twin(model)
        assert torch.equal(model(**inputs).logits, before)
        given = twin(**inputs).logits
    assert given.shape == before.shape
    assert model.fusion.method != "insertion"
    own = dict(model.named_parameters())
    for name, weight in twin.named_parameters():
        assert weight.data_ptr() == own[name].data_ptr()  # shared, not copied
    with torch.no_grad():
        fresh = tiny_casa(method="insertion")
        fresh.projector.load_state_dict(model.projector.state_dict())
        torch.testing.assert_close(given, fresh(**inputs).logits)
    with pytest.raises(UserError, match="already"):
        insertion_twin(twin)
