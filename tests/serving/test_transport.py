"""Peers that do not ask, or do not read, are let go; others are not. The clocks of connections are the test's own."""

import asyncio
import socket
import threading
from contextlib import ExitStack, suppress

import pytest
from websockets.exceptions import ConnectionClosed

from casa.serving import Limits
from casa.testing import PATIENCE

LIMITS = Limits(body_seconds=1001.0, send_seconds=1002.0, caption_seconds=60.0)
SILENT, STALLED = LIMITS.body_seconds, LIMITS.send_seconds


class Timer:
    """One that rings when it is told to."""

    def __init__(self, seconds, act):
        self.seconds, self._act, self._loop, self.is_set = seconds, act, asyncio.get_running_loop(), True

    def cancel(self):
        self.is_set = False

    def ring(self):
        if self.is_set:
            self.is_set = False
            self._act()


class Timers:
    """All that a server's connections have set."""

    def __init__(self):
        self.made = []

    def later(self, seconds, act):
        self.made.append(Timer(seconds, act))
        return self.made[-1]

    def count(self, seconds):
        return sum(timer.is_set and timer.seconds == seconds for timer in list(self.made))

    def ring(self, *seconds):
        for timer in list(self.made):
            if timer.seconds in seconds:
                timer._loop.call_soon_threadsafe(timer.ring)


@pytest.fixture(scope="module")
def timers():
    with pytest.MonkeyPatch.context() as patch:
        made = Timers()
        patch.setattr("casa.serving.server.call_later", made.later)
        yield made


@pytest.fixture(scope="module")
def impatient(serving, timers):
    with serving(limits=LIMITS) as running:
        yield running


def connected(server, **options):
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE, **options)


def is_cut(raw):
    """Waits for the other side's end."""
    try:
        while raw.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_who_does_not_ask_is_let_go(impatient, timers, until, sent):
    with connected(impatient) as raw:
        raw.sendall(sent)
        until(lambda: timers.count(SILENT) == 1)
        timers.ring(SILENT)
        assert is_cut(raw)


def test_a_second_request_that_does_not_end_is_let_go_too(impatient, timers, until):
    with connected(impatient) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /hea")
        until(lambda: timers.count(SILENT) == 1)
        timers.ring(SILENT)
        assert is_cut(raw)


@pytest.mark.slow
def test_who_does_not_read_is_let_go(impatient, timers, until):
    connections = impatient._server.server_state.connections
    before = len(connections)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", impatient.port))
        raw.setblocking(False)

        def has_filled_all_buffers():
            with suppress(BlockingIOError):
                raw.send(b"GET /app.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return timers.count(STALLED) == 1

        until(has_filled_all_buffers)
        timers.ring(STALLED)
        until(lambda: len(connections) == before)


def test_pings_without_end_from_one_who_does_not_read(impatient, raw_bytes, until):
    state = impatient._state
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", impatient.port))
    raw.settimeout(PATIENCE)
    raw.sendall(raw_bytes.upgrade)
    assert raw.recv(12).startswith(b"HTTP/1.1 101")
    until(lambda: state.connections == 1)
    ping = (b"\x89\xfd" + bytes(4) + bytes(125)) * 500

    def send_for_ever():
        while True:
            raw.sendall(ping)

    with pytest.raises(OSError, match=r"reset|pipe|aborted"):
        send_for_ever()
    raw.close()
    until(lambda: state.connections == 0)


@pytest.mark.slow
def test_who_is_silent_in_mid_frame_and_answers_no_ping_has_vanished(serving, client, frames, raw_bytes, until):
    with serving(limits=Limits(ping_seconds=1.0, caption_seconds=60.0)) as server:
        state = server._state
        with connected(server) as raw:
            raw.sendall(raw_bytes.upgrade)
            assert raw.recv(12).startswith(b"HTTP/1.1 101")
            raw.sendall(raw_bytes.hello)
            until(lambda: state.worker.streams == 1)
            raw.sendall(raw_bytes.half_a_frame)
            # the connection stays open, and nobody at its end says a word
            until(lambda: state.worker.streams == 0 and state.connections == 0)
        with client(server) as good:
            good.hello()
            assert good.show(frames[0])[1]["frame"] == 1


def asked(server, path):
    """The first line's status, and all that is answered."""
    with connected(server) as raw:
        raw.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path)
        answer = b""
        while part := raw.recv(65536):
            answer += part
        return int(answer[9:12]), answer


def test_requests_beyond_the_room_are_turned_away_and_health_is_not(serving, raw_bytes, until):
    begun = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    # twice as many requests as WebSockets
    with serving(limits=Limits(connections=1)) as server, ExitStack() as held:
        state = server._state
        for count in (1, 2):
            held.enter_context(connected(server)).sendall(begun)
            until(lambda count=count: state.requests == count)
        socket = held.enter_context(connected(server))
        socket.sendall(raw_bytes.upgrade)
        until(lambda: state.connections == 1)
        # the model, too, does something else
        hold = threading.Event()
        state.worker.call(hold.wait)
        status, answer = asked(server, b"/app.js")
        assert (status, b"retry-after: " in answer.lower()) == (503, True)
        assert asked(server, b"/health")[0] == 200
        hold.set()
        held.close()
        until(lambda: state.requests == 0)
        assert asked(server, b"/app.js")[0] == 200


def test_those_who_say_nothing_make_room_for_those_who_ask(serving, until):
    with serving(limits=Limits(connections=2)) as server, ExitStack() as held:
        raws = [held.enter_context(connected(server)) for _ in range(9)]
        assert asked(server, b"/health")[0] == 200
        # the newest four may stay, one of whom has asked meanwhile
        assert all(is_cut(raw) for raw in raws[:5])
        raws[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raws[-1].recv(65536).startswith(b"HTTP/1.1 200")


def test_a_message_in_parts_without_end(impatient, client, until):
    with client(impatient) as one:
        one.hello()
        raw = one.socket.socket
        raw.sendall(b"\x02\x80" + bytes(4))
        raw.sendall((b"\x00\x80" + bytes(4)) * 2000)
        with pytest.raises(ConnectionClosed):
            one.hear()
    until(lambda: impatient._state.worker.streams == 0)


def test_a_message_in_parts(impatient, client, frames):
    with client(impatient) as one:
        one.hello()
        one.socket.send([frames[0][:100], frames[0][100:]])
        assert one.hear_until("usage")[-1]["frame"] == 1


def test_a_quiet_stream_is_not_silent(impatient, timers, client, frames):
    with client(impatient) as one:
        one.hello()
        # an HTTP connection may not say nothing for so long
        timers.ring(SILENT, STALLED)
        assert one.show(frames[0])[1]["frame"] == 1
