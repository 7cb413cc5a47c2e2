"""Insertion's figures on the page: its bytes are those that an insertion session really holds."""

import pytest
import torch

from casa.analysis.streaming_cost import insertion_twin
from casa.serving.baseline import InsertionCosts, InsertionTally
from casa.streaming import StreamingSession
from casa.testing import tiny_casa, tiny_processor


@pytest.mark.parametrize("delimited", [True, False])
def test_the_bytes_are_those_of_an_insertion_session(model, pictures, delimited):
    processor = tiny_processor(delimited)
    session = StreamingSession(insertion_twin(model), processor, max_new_tokens=5)
    tally = InsertionTally(InsertionCosts(model, processor), processor, session.usage.text_tokens)
    assert tally.frame(0, "", 0.1)["latency"] is None
    tally.tokens = session.usage.text_tokens + session.usage.image_tokens
    for picture in pictures[:5]:
        before = session.usage
        session.step(picture)
        after = session.usage
        said = after.text_tokens - before.text_tokens - 1 - delimited
        # one letter is one token
        figures = tally.frame(after.image_tokens - before.image_tokens, "a" * said, 0.1)
        assert figures["cache_bytes"] == after.cache_bytes


def test_replaced_blocks_count_for_insertion_too():
    model = tiny_casa(dtype=torch.float32, placement="replace", every=2)
    plain = tiny_casa(dtype=torch.float32)
    processor = tiny_processor()
    assert InsertionCosts(model, processor).cache_bytes(10) == InsertionCosts(plain, processor).cache_bytes(10)


def test_time_grows_with_what_is_cached(model):
    costs = InsertionCosts(model, tiny_processor())
    assert costs.extra_seconds(100, 10, 2) is None
    assert not costs.is_measured
    costs.measure(seconds=0.2)
    assert costs.is_measured
    assert costs.prefill is not None
    assert costs.prefill >= 0
    assert costs.decode is not None
    assert costs.decode >= 0
    costs.prefill, costs.decode = 1e-6, 1e-5
    assert costs.extra_seconds(1000, 10, 2) == pytest.approx(1000 * (10 * 1e-6 + 2 * 1e-5))
    tally = InsertionTally(costs, tiny_processor(), 1000)
    assert tally.frame(8, "ab", 0.5)["latency"] == pytest.approx(0.5 + 0.03)
    assert tally.tokens == 1000 + 1 + 1 + 8 + 2
    costs.prefill = costs.decode = 0.0
    assert tally.frame(8, "ab", 0.0701988)["latency"] == 0.0702, "never below what is told of the frame itself"


def test_an_answer_stays_cached(model):
    processor = tiny_processor()
    tally = InsertionTally(InsertionCosts(model, processor), processor, 0)
    tally.answer("what", "no")
    assert tally.tokens == 7


def test_words_like_special_tokens_are_counted_as_words(model):
    processor = tiny_processor()
    tally = InsertionTally(InsertionCosts(model, processor), processor, 0)
    tally.answer("<image>", "<end>")
    assert tally.tokens == 1 + len("<image>") + len("<end>")
