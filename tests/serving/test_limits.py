"""Limits are positive numbers, rates let bursts pass, and a line serves who came first."""

import asyncio

import pytest

from casa.errors import UserError
from casa.serving import Limits
from casa.serving.admission import ChatQueue, RateLimiter


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_above_nothing(value):
    with pytest.raises(UserError, match="idle_seconds"):
        Limits(idle_seconds=value)


def test_a_rate_allows_two_seconds_at_once_and_then_its_pace():
    now = 0.0
    rate = RateLimiter(5, lambda: now)
    assert [rate.take() for _ in range(12)] == [True] * 10 + [False] * 2
    now = 0.4
    assert [rate.take() for _ in range(3)] == [True, True, False]
    now = 1000.0
    assert sum(rate.take() for _ in range(50)) == 10


def test_less_than_one_a_second_is_a_rate_too():
    now = 0.0
    rate = RateLimiter(0.1, lambda: now)
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


def test_a_line_serves_who_came_first_and_says_how_long_it_may_take():
    now, order = [0.0], []

    async def stays():
        return False

    async def served(line, name, seconds):
        guest = line.join()
        assert await line.turn(guest, stays)
        order.append(name)
        now[0] += seconds
        await asyncio.sleep(0)
        line.leave(guest)

    async def scenario():
        line = ChatQueue(1, 3, lambda: now[0])
        assert line.expected_seconds() == 1
        await asyncio.gather(*(served(line, name, 7.0) for name in "abcd"))
        assert (line.here, line.served, line.waiting) == (0, 0, 0)
        assert line.expected_seconds() == 7
        guests = [line.join() for _ in range(4)]
        assert line.join() is None
        assert await line.turn(guests[0], stays)
        waits = [asyncio.create_task(line.turn(guest, stays)) for guest in guests[1:]]
        await asyncio.sleep(0)
        assert (line.served, line.waiting, line.expected_seconds()) == (1, 3, 28)
        # one that leaves in the line makes no place, one that is called in the same moment passes it on
        line.leave(guests[2])
        line.leave(guests[0])
        line.leave(guests[1])
        assert await waits[2]
        waits[1].cancel()
        line.leave(guests[3])
        return line.here, line.served, line.waiting

    assert asyncio.run(scenario()) == (0, 0, 0)
    assert order == list("abcd")


def test_who_is_served_for_long_counts_before_it_has_ended():
    now = [0.0]

    async def stays():
        return False

    async def scenario():
        line = ChatQueue(2, 2, lambda: now[0])
        quick, *slow = [line.join() for _ in range(3)]
        assert await line.turn(quick, stays)
        now[0] += 1.0
        line.leave(quick)
        for guest in slow:
            assert await line.turn(guest, stays)
        # by the last one, until these have taken longer
        assert line.expected_seconds() == 1
        now[0] += 40.0
        assert line.expected_seconds() == 20
        for guest in slow:
            line.leave(guest)
        return line.served, line.expected_seconds()

    assert asyncio.run(scenario()) == (0, 20)


def test_who_has_gone_is_told_nothing_in_the_line(monkeypatch):
    monkeypatch.setattr("casa.serving.admission.POLL_SECONDS", 0.0)

    async def gone():
        return True

    async def scenario():
        line = ChatQueue(1, 1)
        first, second = line.join(), line.join()
        assert await line.turn(first, gone)
        assert not await line.turn(second, gone)
        line.leave(second)
        return line.here, line.waiting

    assert asyncio.run(scenario()) == (1, 0)
