"""A tiny model behind the real app on a real port of this machine, and clients that speak to it."""

import base64
import io
import json
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from websockets.sync.client import connect

from casa.serving import Limits
from casa.serving.app import create_app
from casa.serving.server import Server
from casa.testing import PATIENCE, tiny_casa, tiny_processor


@pytest.fixture(scope="session")
def model():
    """Captions of different lengths, also empty ones: the stop token comes up now and then."""
    made = tiny_casa(dtype=torch.float32)
    made.backbone.lm_head.weight.data[2] = made.backbone.lm_head.weight.data[3:].mean(0) * 3
    made.generation_config.eos_token_id = 2
    return made


@pytest.fixture(scope="session")
def pictures():
    """Pictures of noise, of several sizes."""
    generator = np.random.default_rng(5)
    sizes = [(56, 84), (28, 28), (84, 56)]
    return [Image.fromarray(generator.integers(0, 255, (*sizes[n % 3], 3), dtype=np.uint8)) for n in range(9)]


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def encode():
    return encoded


@pytest.fixture(scope="session")
def frames(pictures):
    """The same pictures as PNG, which loses nothing."""
    return [encoded(picture) for picture in pictures]


@pytest.fixture(scope="session")
def data_urls(frames):
    return ["data:image/png;base64," + base64.b64encode(frame).decode() for frame in frames]


@pytest.fixture(scope="session")
def serving(model):
    """A context: a server of its own with these settings, gone afterwards."""

    @contextmanager
    def run(**settings):
        # no caption is cut, however slow the machine, and nobody is turned away for that
        limits = settings.pop("limits", Limits(caption_seconds=PATIENCE))
        usual = {"name": "tiny", "limits": replace(limits, load=1e9)}
        server = Server(create_app(model, tiny_processor(), **(usual | settings)), port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_for(lambda: server.is_running)
            yield server
        finally:
            server.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()
            # a second server may still run, and its threads with it
            own = [server._state.worker._thread, *server._state.frame_thread._threads]
            assert not [one for one in own if one is not None and one.is_alive()]

    return run


@pytest.fixture(scope="session")
def server(serving):
    """One server for all tests that only look at it from outside."""
    with serving() as running:
        yield running


def wait_for(condition):
    """Until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def until():
    return wait_for


class Client:
    """A WebSocket that speaks JSON."""

    def __init__(self, server, **settings):
        address = f"ws://127.0.0.1:{server.port}/v1/streams"
        opened = connect(address, open_timeout=PATIENCE, close_timeout=2, proxy=None, **settings)
        # closed by `__exit__`, or by the test that breaks it on purpose
        self.socket = opened.__enter__()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def say(self, **message):
        self.socket.send(json.dumps(message))

    def hear(self):
        return json.loads(self.socket.recv(timeout=PATIENCE))

    def hear_until(self, *kinds):
        """All events up to the first of these kinds."""
        events = [self.hear()]
        while events[-1]["type"] not in kinds:
            events.append(self.hear())
        return events

    def hello(self, **settings):
        # one frame in 100 s: no caption is cut where a machine is slow
        self.say(type="hello", **({"max_new_tokens": 5, "fps": 0.01} | settings))
        return self.hear()

    def show(self, frame, at=None):
        """A frame and what was said about it: (text, its usage event)."""
        if at is not None:
            self.say(type="frame", time=at)
        self.socket.send(frame)
        events = self.hear_until("usage")
        return next((event["text"] for event in events if event["type"] == "caption"), ""), events[-1]

    def ask(self, question):
        self.say(type="ask", question=question)
        return self.hear_until("answer")[-1]


@pytest.fixture(scope="session")
def client():
    return Client


def wire(kind, body, size=None):
    """A WebSocket message as a client sends it. kind: 1 for text, 2 for bytes. size: what its head claims to follow."""
    size = len(body) if size is None else size
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size)
    return bytes([0x80 | kind]) + length + bytes(4) + body


class Raw:
    """What a client sends, byte by byte, for those that do what no client does."""

    upgrade = (
        b"GET /v1/streams HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    hello = wire(1, b'{"type": "hello"}')
    # the head of a frame of 60,000 bytes, and a few of them
    half_a_frame = wire(2, bytes(500), 60_000)


@pytest.fixture(scope="session")
def raw_bytes():
    return Raw
