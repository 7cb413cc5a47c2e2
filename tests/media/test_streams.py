"""Streams that break off, on a clock and with connections that are made up here; cameras and screens of each system."""

import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from casa.errors import UserError
from casa.media import decoder, streams
from casa.media.sources import open_source
from casa.media.streams import Backoff, StreamSource, device_address, is_device, open_stream


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept = [*getattr(self, "slept", []), seconds]
        self.now += seconds


class Connection:
    """Stands for a Decoder: frames at these times, arriving then; ends lost or well."""

    rate, aspect, begin, summary, format = 1.0, 1.0, 0.0, "made up", "made,up"

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
    """What a made-up connection gives has no pixels."""
    real, black = decoder.upright, np.zeros((1, 1, 3), np.uint8)
    monkeypatch.setattr(
        decoder, "upright", lambda raw, *aspect: real(raw, *aspect) if hasattr(raw, "pts") else (black, 0)
    )


FOUR = Backoff(first=1, longest=4, attempts=4, jitter=0)


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
        deque(seconds.append(frame.time) for frame in source)
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
    assert next(stream).time == 0
    assert next(stream).time > 30 * 60, "away for half an hour and more"
    stream.close()


def test_it_is_waited_for_as_long_as_was_asked():
    """From when it broke off, each time anew; the last attempt is made when that time is up."""
    clock = Clock()
    backoff = Backoff(first=1, longest=4, attempts=math.inf, jitter=0, seconds=8)
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
    assert [f.time for f in stream] == [0, 1, 2, 3, 4]
    assert second.sought == 2
    assert (stream.counts.reconnects, stream.counts.skipped) == (1, 0)


def test_a_file_that_is_over_is_not_asked_for_again():
    """Servers that tell no length break off at its end as well."""
    clock = Clock()
    stream = source([Connection(clock, [0, 1, 2], duration=3)], clock)
    assert [f.time for f in stream] == [0, 1, 2]
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
    assert next(stream).time == 0
    stream._sleep = lambda seconds: stream.close()
    assert list(stream) == []
    assert stream.counts.reconnects == 0


def test_closed_unread():
    connection = Connection(Clock(), [0])
    source([connection], Clock()).close()
    assert connection.closed


def test_doubling_up_to_the_longest():
    backoff = Backoff(first=0.5, longest=3, jitter=0)
    assert [backoff.delay(n) for n in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1, 2, 3, 3, 3]


def test_chance_only_shortens():
    delays = {Backoff(first=1, longest=8).delay(3) for _ in range(20)}
    assert len(delays) > 10
    assert all(2 <= delay <= 4 for delay in delays)


@pytest.mark.parametrize(
    "bad",
    [
        {"first": 0},
        {"first": 9, "longest": 1},
        {"attempts": -1},
        {"attempts": float("nan")},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"jitter": 2},
    ],
)
def test_a_backoff_that_makes_no_sense(bad):
    with pytest.raises(UserError, match="give"):
        Backoff(**bad)


@pytest.mark.parametrize(
    ("spec", "platform", "where", "format"),
    [
        ("camera:0", "linux", "/dev/video0", "v4l2"),
        ("camera", "linux", "/dev/video0", "v4l2"),
        ("camera:/dev/video2", "linux", "/dev/video2", "v4l2"),
        ("/dev/video1", "linux", "/dev/video1", "v4l2"),
        ("screen", "linux", ":0.0", "x11grab"),
        ("screen::1.0", "linux", ":1.0", "x11grab"),
        ("camera:1", "darwin", "1", "avfoundation"),
        ("camera:FaceTime HD", "darwin", "FaceTime HD", "avfoundation"),
        ("screen", "darwin", "Capture screen 0", "avfoundation"),
        ("camera:USB Camera", "win32", "video=USB Camera", "dshow"),
        ("screen", "win32", "desktop", "gdigrab"),
    ],
)
def test_addresses_of_devices(spec, platform, where, format):
    assert is_device(spec)
    assert device_address(spec, platform)[:2] == (where, format)


def test_what_has_no_camera():
    with pytest.raises(UserError, match="called by its name"):
        device_address("camera:0", "win32")
    with pytest.raises(UserError, match="not read on emscripten"):
        device_address("camera:0", "emscripten")
    assert not is_device("camera.mp4")
    assert not is_device("screens/a.png")


def test_no_such_camera():
    with pytest.raises(UserError, match="camera:987 gives no picture: check that it is plugged in"):
        open_stream("camera:987")


def test_a_pyav_without_devices(monkeypatch):
    monkeypatch.setattr(streams, "device_address", lambda spec, platform: ("0", "no-such-devices", {}))
    with pytest.raises(UserError, match="built without no-such-devices: install the wheel"):
        open_stream("camera:0")


def test_a_camera_is_a_live_source(monkeypatch):
    made_up = ("testsrc=size=64x48:rate=10", "lavfi", {})
    monkeypatch.setattr(streams, "device_address", lambda spec, platform: made_up)
    with open_source("camera:0", fps=5) as source:
        assert source.is_live
        assert source.describe == "camera:0: 64 x 48, wrapped_avframe, live"
        frames = [next(source) for _ in range(4)]
    assert [f.time for f in frames] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert frames[0].picture.shape == (48, 64, 3)
    assert frames[0].picture.std() > 20
    assert list(source) == []
