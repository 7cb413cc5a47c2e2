"""Limits are positive numbers, and rates let bursts pass."""

import pytest

from casa.errors import UserError
from casa.serving import Limits
from casa.serving.rate import Rate


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_above_nothing(value):
    with pytest.raises(UserError, match="idle_seconds"):
        Limits(idle_seconds=value)


def test_a_rate_allows_two_seconds_at_once_and_then_its_pace():
    now = 0.0
    rate = Rate(5, lambda: now)
    assert [rate.take() for _ in range(12)] == [True] * 10 + [False] * 2
    now = 0.4
    assert [rate.take() for _ in range(3)] == [True, True, False]
    now = 1000.0
    assert sum(rate.take() for _ in range(50)) == 10


def test_less_than_one_a_second_is_a_rate_too():
    now = 0.0
    rate = Rate(0.1, lambda: now)
    assert [rate.take(), rate.take()] == [True, False]
    now = 10.0
    assert rate.take()


def test_limits_from_texts():
    found = Limits.parse(["frame_bytes=1000", "idle_seconds=1.5"])
    assert found == Limits(frame_bytes=1000, idle_seconds=1.5)
    for wrong, word in [
        ("frame_byte=1", "did you mean 'frame_bytes'"),
        ("x", "the limits are"),
        ("frame_bytes=1.5", "whole number"),
        ("frame_bytes", "whole number"),
        ("idle_seconds=soon", "a number"),
        ("idle_seconds=nan", "above 0"),
        ("outbox=-1", "above 0"),
    ]:
        with pytest.raises(UserError, match=word):
            Limits.parse([wrong])
