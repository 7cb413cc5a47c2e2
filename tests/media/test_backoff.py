"""Delays grow, are bounded, and differ by chance."""

import pytest

from casa.errors import UserError
from casa.media.backoff import Backoff


def test_doubling_up_to_the_longest():
    backoff = Backoff(first=0.5, most=3, jitter=0)
    assert [backoff.delay(n) for n in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1, 2, 3, 3, 3]


def test_chance_only_shortens():
    assert Backoff(first=1, most=8, jitter=0.5, rng=lambda: 1.0).delay(3) == 2
    delays = {Backoff(first=1, most=8).delay(3) for _ in range(20)}
    assert len(delays) > 10
    assert all(2 <= delay <= 4 for delay in delays)


@pytest.mark.parametrize(
    "bad",
    [
        {"first": 0},
        {"first": 9, "most": 1},
        {"attempts": -1},
        {"attempts": float("nan")},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"jitter": 2},
    ],
)
def test_settings_that_make_no_sense(bad):
    with pytest.raises(UserError, match="give"):
        Backoff(**bad)
