"""The server under abuse: each misuse gets a plain error or is cleaned up, and one good stream never notices.

The good stream runs beside every abuser, must hear on while there is abuse, and must say what it says alone.
"""

import ctypes
import gc
import http.client
import json
import socket
import struct
import threading
import time
import weakref
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from casa.memory import resident_bytes
from casa.serving import Limits
from casa.streaming import StreamingSession
from casa.testing import PATIENCE, claimed_png, tiny_processor

LIMITS = Limits(
    frame_bytes=100_000,
    message_bytes=4000,
    body_bytes=200_000,
    faults=5,
    outbox=16,
    send_seconds=0.5,
    connections=8,
    body_seconds=1.0,
    hello_seconds=5.0,
    messages_per_second=1000.0,
    caption_seconds=60.0,
)


FEW_BYTES = 4 * 2**20  # by which memory may differ between rounds of abuse; one that kept its frames would take more


@pytest.fixture(scope="module")
def busy(serving):
    with serving(max_sessions=4, limits=LIMITS) as running:
        yield running


class Watcher(threading.Thread):
    """The good stream: shows frame after frame until it is stopped."""

    def __init__(self, client, server, frames):
        super().__init__()
        self._client, self._server, self._frames = client, server, frames
        self._stopping = threading.Event()
        self.heard, self.error = [], None

    def run(self):
        try:
            with self._client(self._server) as one:
                one.hello(fps=0.01, max_new_tokens=3)
                while not self._stopping.is_set() or len(self.heard) < 3:
                    text, _ = one.show(self._frames[len(self.heard) % len(self._frames)])
                    self.heard.append(text)
                    time.sleep(0.1)
        except Exception as error:
            self.error = error

    def stop(self):
        self._stopping.set()
        self.join(PATIENCE)


def keep_on(watcher, misuse, times=1):
    """Misuses the server so many times at least, and on until the good stream has heard three captions meanwhile.

    misuse: called with 0, 1, 2 ...
    """
    enough, end, done = len(watcher.heard) + 3, time.monotonic() + PATIENCE, 0
    while done < times or len(watcher.heard) < enough:
        assert watcher.error is None, watcher.error
        assert time.monotonic() < end, "the good stream's captions stopped"
        misuse(done)
        done += 1


@pytest.fixture(autouse=True)
def watcher(busy, client, model, pictures, frames, until):
    """Around every test: the good stream, and afterwards a server that holds nothing."""
    watcher = Watcher(client, busy, frames)
    watcher.start()
    until(lambda: watcher.heard or watcher.error)
    yield watcher
    # captions still come, while the abuser may not be cleaned up yet
    so_far = len(watcher.heard)
    until(lambda: len(watcher.heard) > so_far or watcher.error)
    watcher.stop()
    assert watcher.error is None
    session = StreamingSession(model, tiny_processor(), max_text_tokens=1024, max_new_tokens=3)
    assert watcher.heard == [session.step(pictures[n % len(pictures)]) for n in range(len(watcher.heard))]
    state = busy._state
    until(lambda: state.worker.streams == 0 and len(state.worker.engine) == 0)
    until(lambda: state.connections == 0 and state.chats.here == 0)


def closed_with(one):
    """The events until the end, and its code."""
    events = []
    try:
        while True:
            events.append(one.hear())
    except ConnectionClosed as closed:
        return events, closed.rcvd.code if closed.rcvd is not None else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "frame", [b"no picture" * 9, claimed_png(60_000, 60_000), claimed_png(6_000, 6_000), b"\xff\xd8\xff" + bytes(99)]
)
def test_a_frame_that_is_no_picture(busy, client, frames, watcher, frame):
    def misuse(_):
        with client(busy) as one:
            one.hello()
            one.socket.send(frame)
            assert one.hear()["fatal"] is False
            assert one.show(frames[0])[1]["frame"] == 2

    keep_on(watcher, misuse)


@pytest.mark.slow
def test_text_instead_of_json_until_patience_ends(busy, client):
    with client(busy) as one:
        one.hello()
        for _ in range(LIMITS.faults):
            one.socket.send("hello there")
        events, code = closed_with(one)
        assert [event["fatal"] for event in events][-1] is True
        assert "5 wrong messages" in events[-1]["message"]
        assert code == 1008


@pytest.mark.slow
def test_wrong_frames_with_a_time_each_until_patience_ends(busy, client):
    with client(busy) as one:
        one.hello()
        for number in range(LIMITS.faults):
            one.say(type="frame", time=number)
            one.socket.send(b"no picture")
            assert one.hear().get("frame", LIMITS.faults) == number + 1
        assert closed_with(one)[1] == 1008


@pytest.mark.slow
def test_a_fault_of_the_server_is_said_and_nobody_elses(busy, client, monkeypatch, caplog):
    def fail(*_):
        raise ZeroDivisionError

    with client(busy) as one:
        one.hello()
        monkeypatch.setattr(busy._state.worker, "ask", fail)
        one.say(type="ask", question="who")
        events, code = closed_with(one)
        assert "ZeroDivisionError" in events[-1]["message"]
        assert (events[-1]["fatal"], code) == (True, 1011)
    assert "a fault of the server" in caplog.text


@pytest.mark.slow
def test_oversized_frames_and_messages(busy, client, frames, watcher):
    def misuse(_):
        with client(busy) as one:
            one.hello()
            one.socket.send(bytes(LIMITS.frame_bytes + 1))
            assert "100000 bytes" in one.hear()["message"]
            one.say(type="ask", question="a" * 5000)
            assert "4000 characters" in one.hear()["message"]
            assert one.show(frames[0])[1]["frame"] == 2
            one.socket.send(bytes(3 * LIMITS.frame_bytes))
            assert closed_with(one)[1] == 1009

    keep_on(watcher, misuse)


@pytest.mark.slow
def test_a_client_that_vanishes_in_mid_frame(busy, client, raw_bytes, until):
    before = busy._state.worker.streams
    one = client(busy)
    one.hello()
    raw = one.socket.socket
    raw.sendall(raw_bytes.half_a_frame)
    assert busy._state.worker.streams == before + 1
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.shutdown(socket.SHUT_RDWR)
    until(lambda: busy._state.worker.streams == before)
    one.socket.close()


@pytest.mark.slow
def test_200_connects_and_drops_leave_nothing(busy, raw_bytes, until, watcher):
    state = busy._state
    before = state.worker.streams
    sessions = []

    def misuse(number):
        raw = socket.create_connection(("127.0.0.1", busy.port), timeout=PATIENCE)
        if number % 4:
            raw.sendall(raw_bytes.upgrade)
        if number % 4 == 3:
            raw.sendall(raw_bytes.hello)
            raw.recv(1)
        live = [stream.session for stream in list(state.worker._streams.values())]
        sessions.extend(weakref.ref(session) for session in live if session is not None)
        raw.close()

    keep_on(watcher, misuse, 200)
    until(lambda: state.worker.streams == before and state.connections == before)
    gc.collect()
    # only the good stream's is left
    assert len({id(ref()) for ref in sessions} - {id(None)}) <= before
    assert len(state.transcripts) <= LIMITS.ended_streams + before


@pytest.mark.slow
def test_a_slow_reader_delays_nobody_and_is_let_go(busy, client, until):
    state, before = busy._state, busy._state.worker.streams
    # small buffers below, so that a reader that reads nothing is soon felt above
    usual = busy._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    busy._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", busy.port))
    one = client(busy, sock=raw, max_queue=1, compression=None)
    busy._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual)
    stream = state.worker._streams[one.hello()["stream"]]
    most = 0
    end = time.monotonic() + PATIENCE
    while state.worker.streams > before and time.monotonic() < end:
        # what a busy stream would be told
        stream.outbox.put({"type": "usage", "filler": "x" * 2000})
        most = max(most, len(stream.outbox))
        time.sleep(0.002)
    until(lambda: state.worker.streams == before)
    assert most == LIMITS.outbox
    raw.close()
    one.socket.close()


def test_too_many_frames_are_dropped_and_counted(busy, client, frames):
    with client(busy) as one:
        one.hello(fps=30)
        # a fast machine refuses so many in a row that it ends the stream itself, maybe before all are sent
        with suppress(ConnectionClosed):
            for _ in range(150):
                one.socket.send(frames[1])
            one.say(type="close")
        events, code = closed_with(one)
        assert code in (1000, 1008)
        assert any("frames a second" in event.get("message", "") for event in events)
        assert any(event["type"] == "dropped" for event in events)


@pytest.mark.slow
def test_more_sessions_and_connections_than_allowed(busy, client, until):
    opened = [client(busy) for _ in range(3)]
    for one in opened:
        assert one.hello()["type"] == "ready"
    full = client(busy)
    assert "4 sessions are taken" in full.hello()["message"]
    assert closed_with(full)[1] == 1013
    until(lambda: busy._state.connections == 4)
    idle = [client(busy) for _ in range(4)]
    extra = client(busy)
    events, code = closed_with(extra)
    assert "connections are taken" in events[0]["message"]
    assert code == 1013
    for one in [*opened, full, *idle, extra]:
        one.socket.close()


@pytest.mark.slow
def test_oversized_bodies(busy, watcher):
    def misuse(number):
        connection = http.client.HTTPConnection("127.0.0.1", busy.port, timeout=PATIENCE)
        parts = [b"x" * 50_001] * 4
        try:
            if number % 2:
                connection.request("POST", "/v1/chat/completions", iter(parts), encode_chunked=True)
            else:
                connection.putrequest("POST", "/v1/chat/completions")
                connection.putheader("Content-Length", str(10**12))
                connection.endheaders(b"x" * 100)
            answer = connection.getresponse()
            assert answer.status == 413
            assert "200000 bytes" in json.loads(answer.read())["error"]["message"]
        finally:
            connection.close()

    keep_on(watcher, misuse, 2)


@pytest.mark.slow
def test_a_body_that_never_ends(busy):
    connection = http.client.HTTPConnection("127.0.0.1", busy.port, timeout=PATIENCE)
    try:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert answer.status == 408
        assert "in time" in json.loads(answer.read())["error"]["message"]
    finally:
        connection.close()


@pytest.mark.slow
def test_a_reader_of_a_chat_that_goes_away(busy, until):
    body = {"model": "tiny", "stream": True, "temperature": 2, "messages": [{"role": "user", "content": "tell"}]}
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", busy.port, timeout=PATIENCE)
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": stream, "max_tokens": 1000}))
        if stream:
            connection.getresponse().read(10)
        connection.sock and connection.sock.close()
        connection.close()
    until(lambda: busy._state.chats.here == 0 and busy._state.worker.chats == 0)


def held():
    """Bytes of memory that this process holds, once what nobody uses has gone back to the system."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
    return resident_bytes()


@pytest.mark.slow
def test_memory_returns_to_where_it_was_after_every_kind_of_abuse(
    busy, client, frames, encode, raw_bytes, until, watcher
):
    state = busy._state
    noise = np.random.default_rng(7).integers(0, 255, (176, 176, 3), dtype=np.uint8)
    # as large as frames may be: were they kept, it would show
    large = encode(Image.fromarray(noise))
    assert LIMITS.frame_bytes // 2 < len(large) <= LIMITS.frame_bytes

    def settled():
        """The good stream alone is left."""
        until(lambda: state.worker.streams == 1 and state.connections == 1 and state.chats.here == 0)

    def round_of_abuse():
        with client(busy) as one:
            one.hello(max_new_tokens=1)
            for _ in range(25):
                one.show(large)
                for wrong in (claimed_png(60_000, 60_000), bytes(LIMITS.frame_bytes + 1), "no json"):
                    one.socket.send(wrong)
                    one.hear()
            one.socket.socket.sendall(raw_bytes.half_a_frame)
            one.socket.socket.shutdown(socket.SHUT_RDWR)
        settled()
        test_200_connects_and_drops_leave_nothing(busy, raw_bytes, until, watcher)
        test_text_instead_of_json_until_patience_ends(busy, client)
        test_too_many_frames_are_dropped_and_counted(busy, client, frames)
        settled()
        test_more_sessions_and_connections_than_allowed(busy, client, until)
        settled()
        test_oversized_bodies(busy, watcher)
        test_a_reader_of_a_chat_that_goes_away(busy, until)
        for _ in range(20):
            connection = http.client.HTTPConnection("127.0.0.1", busy.port, timeout=PATIENCE)
            connection.request("POST", "/v1/chat/completions", bytes(LIMITS.body_bytes - 1))
            assert connection.getresponse().status == 400
            connection.close()
        settled()

    # the good stream has been heard, and nothing else has happened yet
    before = held()
    round_of_abuse()
    # a slow reader takes its time, so once
    test_a_slow_reader_delays_nobody_and_is_let_go(busy, client, until)
    until(lambda: held() < 1.05 * before)
    after_one = held()
    for _ in range(2):
        round_of_abuse()
    until(lambda: held() < after_one + FEW_BYTES)
