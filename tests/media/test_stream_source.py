"""Streams that break off, on a clock and with connections that are made up here."""

import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from casa.errors import UserError
from casa.media import stream_source
from casa.media.backoff import Backoff
from casa.media.stream_source import StreamSource


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept = [*getattr(self, "slept", []), seconds]
        self.now += seconds


class Connection:
    """Stands for a Decoder: frames at these times, arriving then; ends lost or well."""

    rate, aspect, summary, format = 1.0, 1.0, "made up", "made,up"

    def __init__(self, clock, times, lost=True, duration=math.inf, timed=True, size=0):
        self.clock, self.times, self.lost, self.duration, self.timed, self.size = (
            clock,
            times,
            lost,
            duration,
            timed,
            size,
        )
        self.closed, self.sought = 0, None

    def frames(self):
        for k, time in enumerate(self.times):
            self.clock.now += 1.0 if k else 0.0
            self.counts.decoded += 1
            yield time, SimpleNamespace(time=time), 1.0

    def seek(self, time):
        self.sought = time

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    monkeypatch.setattr(stream_source, "upright", lambda raw, aspect: (np.zeros((1, 1, 3), np.uint8), 0))


FOUR = Backoff(first=1, most=4, attempts=4, jitter=0)


def source(connections, clock, fps=1, backoff: Backoff | None = FOUR, **settings):
    """`connections` are opened in turn; None is one that fails, and so is any after the last."""
    waiting = list(connections)

    def opened(counts):
        connection = waiting.pop(0) if waiting else None
        if connection is None:
            raise UserError("nobody there")
        connection.counts = counts
        return connection

    return StreamSource(opened, "cam", fps, backoff=backoff, clock=clock, sleep=clock.sleep, **settings)


def until_it_gives_up(source):
    """The seconds of its frames."""
    seconds = []
    with pytest.raises(UserError, match="cam broke off and did not come back in 4 attempts: check its connection"):
        deque(seconds.append(frame.seconds) for frame in source)
    return seconds


def test_the_clock_goes_on_over_connections():
    clock = Clock()
    stream = source([Connection(clock, [50, 51, 52]), None, Connection(clock, [0, 1])], clock)
    assert stream.is_live
    assert stream.describe == "cam: made up, live"
    # lost at 2 s, tried after 1 s and after 2 s more: there again at 5 s
    assert until_it_gives_up(stream) == [0, 1, 2, 5, 6]
    assert clock.slept == [1, 2, 1, 2, 4, 4]
    assert stream.counts.reconnects == 1


def test_connections_that_give_nothing_count_as_failures():
    clock = Clock()
    empty = [Connection(clock, []) for _ in range(9)]
    stream = source([Connection(clock, [0]), *empty], clock)
    assert until_it_gives_up(stream) == [0]
    assert clock.slept == [1, 2, 4, 4]
    assert stream.counts.reconnects == 4
    assert all(connection.closed for connection in empty[:4])


def test_a_live_stream_is_waited_for_without_end():
    clock = Clock()
    stream = source([Connection(clock, [0]), *[None] * 100, Connection(clock, [0])], clock, backoff=None)
    assert next(stream).seconds == 0
    assert next(stream).seconds > 30 * 60, "away for half an hour and more"
    stream.close()


def test_it_is_waited_for_as_long_as_was_asked():
    """From when it broke off, each time anew; the last attempt is made when that time is up."""
    clock = Clock()
    backoff = Backoff(first=1, most=4, attempts=math.inf, jitter=0, seconds=8)
    stream = source([Connection(clock, [0]), None, None, None, Connection(clock, [0])], clock, backoff=backoff)
    assert until_it_gives_up(stream) == [0, 8]
    assert clock.slept == [1, 2, 4, 1] * 2


def test_a_file_on_a_server_is_given_up():
    clock = Clock()
    stream = source([Connection(clock, [0, 1], duration=9)], clock, backoff=None)
    with pytest.raises(UserError, match="did not come back in 10 attempts"):
        list(stream)


def test_that_a_stream_broke_off_is_told_once(caplog):
    clock = Clock()
    until_it_gives_up(source([Connection(clock, [0]), Connection(clock, [])], clock))
    assert [record.getMessage() for record in caplog.records] == ["cam broke off: connecting again"]


def test_a_live_stream_that_ends_well_is_taken_up_again_too():
    clock = Clock()
    stream = source([Connection(clock, [0, 1], lost=False), Connection(clock, [7, 8], lost=False)], clock)
    assert until_it_gives_up(stream) == [0, 1, 2, 3]


def test_a_clock_that_is_set_back_goes_on():
    clock = Clock()
    stream = source([Connection(clock, [10, 11, 12, 0, 1])], clock)
    assert until_it_gives_up(stream) == [0, 1, 2, 3, 4]
    late = source([Connection(clock, [10, 11, 10.5, 12])], clock)
    assert until_it_gives_up(late) == [0, 1, 2]
    assert late.counts.skipped == 1


def test_a_stream_without_times_is_timed_by_its_arrival():
    clock = Clock()
    stream = source([Connection(clock, [0, 0.04, 0.08], timed=False), Connection(clock, [0], timed=False)], clock)
    assert until_it_gives_up(stream) == [0, 1, 2, 3]


def test_the_first_connection_must_work():
    with pytest.raises(UserError, match="nobody there"):
        source([None], Clock())


def test_a_file_on_a_server_goes_on_where_it_broke_off():
    clock = Clock()
    second = Connection(clock, [1, 2, 3, 4], lost=False, duration=5)
    stream = source([Connection(clock, [0, 1, 2], duration=5), second], clock)
    assert not stream.is_live
    assert [f.seconds for f in stream] == [0, 1, 2, 3, 4]
    assert second.sought == 2
    assert (stream.counts.reconnects, stream.counts.skipped) == (1, 0)


def test_a_file_that_is_over_is_not_asked_for_again():
    """Servers that tell no length break off at its end as well."""
    clock = Clock()
    stream = source([Connection(clock, [0, 1, 2], duration=3)], clock)
    assert [f.seconds for f in stream] == [0, 1, 2]
    assert not hasattr(clock, "slept")


def test_a_file_that_always_breaks_off_at_the_same_place_is_given_up():
    clock = Clock()
    stream = source([Connection(clock, [0, 1], duration=9) for _ in range(9)], clock)
    assert until_it_gives_up(stream) == [0]  # at 1 s the next frame was never seen, so its end is not known
    assert stream.counts.reconnects == 4


def test_a_file_without_a_single_frame_says_so():
    clock = Clock()
    stream = source([Connection(clock, [], lost=False, duration=3)], clock)
    with pytest.raises(UserError, match="cam holds no readable frame"):
        next(stream)


@pytest.mark.parametrize(("size", "format", "live"), [(5, "matroska,webm", False), (5, "hls", True), (0, "x", True)])
def test_what_is_live(size, format, live):
    connection = Connection(Clock(), [0], size=size)
    connection.format = format
    assert source([connection], Clock()).is_live is live
    assert source([connection], Clock(), live=not live).is_live is not live


def test_closing_cuts_the_waiting_short():
    clock = Clock()
    stream = source([Connection(clock, [0]), Connection(clock, [0])], clock)
    assert next(stream).seconds == 0
    stream._sleep = lambda seconds: stream.close()
    assert list(stream) == []
    assert stream.counts.reconnects == 0


def test_closed_unread():
    connection = Connection(Clock(), [0])
    source([connection], Clock()).close()
    assert connection.closed
