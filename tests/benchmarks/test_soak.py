"""A soak in small: constant once the bound is reached, growing by text alone without one, gone on with after a kill."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from casa.benchmarks.settings import SoakSettings
from casa.benchmarks.soak import allowed_bytes, bench_soak, soak, soak_summary, soak_table
from casa.errors import UserError
from casa.streaming import StreamingSession
from casa.testing import tiny_casa, tiny_checkpoint, tiny_processor

BOUND = 48


@pytest.fixture(scope="module")
def model():
    return tiny_casa(dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(5)]


def watching(model, bound):
    return StreamingSession(model, tiny_processor(), max_text_tokens=bound, max_new_tokens=3)


def last(blocks):
    return list(blocks)[-1]


@pytest.fixture(scope="module")
def bounded(model, pictures):
    session = watching(model, BOUND)
    return last(soak(session, pictures, 200, block=40)), allowed_bytes(session, asked=False)


@pytest.mark.slow
def test_bytes_are_constant_once_the_bound_is_reached(bounded):
    blocks, allowed = bounded
    assert [block["frames"] for block in blocks] == [40, 80, 120, 160, 200]
    assert len({tuple(block["cache_bytes"]) for block in blocks[1:]}) == 1, "the same least and most in every block"
    assert len({tuple(block["text_tokens"]) for block in blocks[1:]}) == 1
    assert max(block["text_tokens"][1] for block in blocks) <= BOUND
    assert max(block["cache_bytes"][1] for block in blocks) <= allowed
    assert {block["image_tokens"] for block in blocks} == {4}
    assert soak_summary(blocks, allowed)["constant"] is True
    assert soak_summary(blocks, allowed - 10**6)["constant"] is False


@pytest.mark.slow
def test_without_a_bound_the_growth_is_the_texts_alone(model, pictures):
    session = watching(model, None)
    blocks = last(soak(session, pictures, 60, block=20))
    token = session.usage.text_bytes // session.usage.text_tokens
    for before, after in itertools.pairwise(blocks):
        grown = after["text_tokens"][1] - before["text_tokens"][1]
        assert grown > 0
        assert after["cache_bytes"][1] - before["cache_bytes"][1] == grown * token
    assert allowed_bytes(session) is None
    assert soak_summary(blocks, None)["constant"] is None
    assert "bound" not in soak_table(soak_summary(blocks, None))


@pytest.mark.slow
def test_a_soak_that_was_killed_goes_on(model, pictures, tmp_path):
    state = tmp_path / "a.session"
    whole = last(soak(watching(model, BOUND), pictures, 45, block=10))
    running = soak(watching(model, BOUND), pictures, 45, block=10, state=state)
    next(running)
    next(running)
    session = StreamingSession.load(state, model, tiny_processor())
    assert session.frames == 20
    again = last(soak(session, pictures, 45, block=10, state=state))
    same = ("frames", "cache_bytes", "text_tokens", "image_tokens", "said")
    assert [[b[n] for n in same] for b in again] == [[b[n] for n in same] for b in whole]
    assert [block["process"] for block in again] == [0, 0, 1, 1, 1]
    assert list(soak(session, pictures, 45)) == []


@pytest.mark.slow
def test_what_is_found_is_written_plotted_and_gone_on_with(tmp_path):
    checkpoint = str(tiny_checkpoint(tmp_path / "model"))
    settings, state = SoakSettings(checkpoint, 4, BOUND, size=56, block=2), tmp_path / "a.session"
    running = bench_soak(settings, state)
    next(running).write(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["bench"], record["frames"], len(record["blocks"])) == ("soak", 2, 1)
    with pytest.raises(UserError, match="other settings"):
        next(bench_soak(replace(settings, size=84), state, resume=True))
    with pytest.raises(UserError, match="raise frames"):
        next(bench_soak(replace(settings, frames=2), state, resume=True))
    (found,) = bench_soak(settings, state, resume=True)
    assert [block["process"] for block in found.figures["blocks"]] == [0, 1]
    assert "never above its bound: True" in found.table
    assert not state.exists()
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("numbers", [{"frames": 0}, {"frames": 5, "block": 0}])
def test_numbers_that_cannot_be(numbers):
    with pytest.raises(UserError, match="1 or more"):
        SoakSettings(**numbers)
