"""An ingress before two replicas, all in this process: streams stay, leave and go on; nothing is told twice or lost."""

import asyncio
import copy
import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from casa.models import ImageCache
from casa.serving import Limits
from casa.serving.app import create_app
from casa.serving.handover import Handover
from casa.serving.ingress import create_ingress, first_picture
from casa.serving.replicas import Registry, Replicas, Report
from casa.serving.server import Server
from casa.streaming import StreamingSession
from casa.testing import PATIENCE, tiny_processor
from projects.loadtest.client import watch

LIMITS = Limits(caption_seconds=PATIENCE, load=1e9, sessions=4)
SECRET = "of the replicas"


class Running:
    """A server in a thread."""

    def __init__(self, app, until):
        self.server = Server(app, port=0)
        self.state = app.state.casa
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.is_running)

    @property
    def address(self):
        return f"127.0.0.1:{self.server.port}"

    def stop(self):
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


class OneReplica(Running):
    def __init__(self, name, model, folder, until, limits):
        self.name, self.handover = name, Handover(folder, seconds=0.01)
        app = create_app(
            copy.deepcopy(model),
            tiny_processor(),
            name="tiny",
            token=SECRET,
            limits=limits,
            handover=self.handover,
            image_cache=ImageCache(),
        )
        super().__init__(app, until)

    def report(self):
        worker = self.state.worker
        return Report(
            self.name, self.address, 10.0, sum(worker.asked()), worker.streams, leaving=self.handover.draining
        )

    def drain(self):
        self.state.loop.call_soon_threadsafe(self.handover.drain)

    def die(self):
        """As a killed process: every connection breaks off, and no new one is taken."""

        def cut():
            for server in self.server._server.servers:
                server.close()
            for connection in list(self.server._server.server_state.connections):
                connection.transport.abort()

        self.state.loop.call_soon_threadsafe(cut)


class Cluster:
    def __init__(self, replicas, ingress):
        self.replicas, self.ingress = replicas, ingress
        self.url = f"ws://{ingress.address}/v1/streams"

    def busy(self):
        return next(one for one in self.replicas if one.state.worker.streams)


@pytest.fixture
def cluster(model, tmp_path, until):
    @contextmanager
    def run(count=2, limits=LIMITS, **settings):
        registry = Registry()
        replicas = [OneReplica(str(n), model, tmp_path / "states", until, limits) for n in range(count)]

        def read():
            for one in replicas:
                registry.report(one.report())
            return registry.reports()

        followed = Replicas(read)
        ingress = Running(create_ingress(followed, SECRET, limits=limits, **settings), until)
        try:
            until(lambda: len(followed.all()) == count)
            yield Cluster(replicas, ingress)
        finally:
            ingress.stop()
            for one in replicas:
                one.stop()

    return run


HELLO = {"max_new_tokens": 5, "fps": 0.01}  # no caption is cut where a machine is slow


def alone(model, pictures):
    """What a session says of pictures that nothing interrupts."""
    session = StreamingSession(model, tiny_processor(), max_text_tokens=1024, max_new_tokens=5)
    return [session.step(picture) for picture in pictures]


class Client:
    def __init__(self, url, **hello):
        self.socket = connect(url, open_timeout=PATIENCE, proxy=None).__enter__()
        self.say(type="hello", **(HELLO | hello))

    def say(self, **message):
        self.socket.send(json.dumps(message))

    def hear_until(self, *kinds):
        events = []
        while not events or events[-1]["type"] not in kinds:
            events.append(json.loads(self.socket.recv(timeout=PATIENCE)))
        return events

    def frame(self, data):
        self.socket.send(data)
        return self.hear_until("usage")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def texts(events):
    return {event["frame"]: event["text"] for event in events if event["type"] == "caption"}


def test_a_stream_says_what_it_says_on_one_machine(cluster, model, pictures, frames, until):
    said = alone(model, pictures[:5])
    with cluster() as running:
        with Client(running.url) as client:
            (ready,) = client.hear_until("ready")
            assert {"stream", "fps", "prompt", "insertion"} <= ready.keys()
            assert "frame" not in ready
            events = [event for data in frames[:5] for event in client.frame(data)]
            assert texts(events) == {number: text for number, text in enumerate(said, 1) if text}
            client.say(type="ask", question="what?")
            assert client.hear_until("answer")[-1]["question"] == "what?"
            about = f"http://{running.ingress.address}/v1/streams/{ready['stream']}/captions.jsonl"
            with urllib.request.urlopen(about) as answer:
                assert [json.loads(line)["text"] for line in answer] == [text for text in said if text]
        # whoever has gone leaves nothing behind
        until(lambda: not any(one.state.worker.streams for one in running.replicas))
        until(lambda: not list(running.replicas[0].handover.folder.iterdir()))


def test_a_stream_that_is_drained_goes_on_as_if_nothing_had_been(cluster, model, pictures, frames):
    said = alone(model, pictures)
    with cluster() as running, Client(running.url) as client:
        client.hear_until("ready")
        events = [event for data in frames[:4] for event in client.frame(data)]
        left = running.busy()
        left.drain()
        moved = client.hear_until("moved")
        events += moved + [event for data in frames[4:] for event in client.frame(data)]
        assert moved[-1]["frame"] == 4
        assert running.busy() is not left
        assert [event["frame"] for event in events if event["type"] == "usage"] == [*range(1, len(frames) + 1)]
        assert texts(events) == {number: text for number, text in enumerate(said, 1) if text}
        assert events[-1]["watched"] == len(frames)


def test_a_stream_whose_replica_dies_goes_on_from_its_state(cluster, model, pictures, frames, until):
    said = alone(model, pictures)
    with cluster() as running, Client(running.url) as client:
        client.hear_until("ready")
        events = [event for data in frames[:4] for event in client.frame(data)]
        dead = running.busy()
        (state,) = dead.handover.folder.iterdir()
        until(lambda: StreamingSession.saved_notes(state)["frame"] == 4)
        dead.die()
        events += client.hear_until("moved")
        events += [event for data in frames[4:] for event in client.frame(data)]
        assert [event["frame"] for event in events if event["type"] == "usage"] == [*range(1, len(frames) + 1)]
        assert texts(events) == {number: text for number, text in enumerate(said, 1) if text}


def test_what_is_asked_while_a_stream_moves_is_answered(cluster, frames):
    with cluster() as running, Client(running.url) as client:
        client.hear_until("ready")
        client.frame(frames[0])
        running.busy().drain()
        client.say(type="ask", question="what?")
        client.say(type="ask", question="who?")
        answers = [client.hear_until("answer")[-1]["question"] for _ in range(2)]
        assert answers == ["what?", "who?"]


@pytest.mark.slow
def test_frames_that_come_all_the_time_are_told_of_once(cluster, frames):
    """Replicas come to their end one after another while four cameras send; every frame is watched or dropped."""

    async def all_of_them(running):
        tasks = [
            asyncio.create_task(watch(running.url, frames * 5, fps=10, hello=HELLO | {"fps": 10})) for _ in range(4)
        ]
        await asyncio.sleep(1.5)
        running.replicas[0].drain()
        await asyncio.sleep(1)
        running.replicas[1].die()
        return await asyncio.gather(*tasks)

    with cluster(3) as running:
        logs = asyncio.run(all_of_them(running))
        assert any(log.moved for log in logs)  # the third replica stays, and so do its streams
        for log in logs:
            assert (log.refused, log.errors) == (None, [])
            assert (log.twice, log.lost) == (0, 0)


def test_a_stream_too_many_is_told_why_and_others_stay(cluster, frames):
    limits = replace(LIMITS, sessions=1)
    with cluster(limits=limits) as running, Client(running.url) as one, Client(running.url) as two:
        one.hear_until("ready")
        two.hear_until("ready")
        with Client(running.url) as third:
            (event,) = third.hear_until("error", "ready")
            assert event["fatal"]
            assert "all 1 sessions are taken" in event["message"]
        assert one.frame(frames[0])[-1]["frame"] == 1


def chat(address, url, token=None):
    parts = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    wanted = urllib.request.Request(f"http://{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(wanted) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_a_chat_goes_where_its_picture_is_known(cluster, data_urls):
    with cluster() as running:
        for url in data_urls[:6]:
            assert chat(running.ingress.address, url) == chat(running.ingress.address, url)
        caches = [one.state.images for one in running.replicas]
        assert sum(cache.misses for cache in caches) == 6
        assert sum(cache.hits for cache in caches) == 6
        assert all(cache.misses for cache in caches), "six pictures are spread"
        # and on to another, where that one is gone
        running.replicas[0].die()
        assert [chat(running.ingress.address, url) for url in data_urls[:6]]


def test_who_may_come_in(cluster, data_urls):
    with cluster(token="open") as running:
        ingress, inside = running.ingress.address, running.replicas[0].address
        for address, token, status in ((ingress, None, 401), (ingress, "wrong", 401), (inside, "open", 401)):
            with pytest.raises(urllib.error.HTTPError) as error:
                chat(address, data_urls[0], token)
            assert error.value.code == status
            error.value.close()
        assert chat(ingress, data_urls[0], "open")
        with Client(running.url) as client:
            assert "give the server's token" in client.hear_until("error")[0]["message"]
        with Client(running.url, token="open") as client:
            assert client.hear_until("ready", "error")[0]["type"] == "ready"
        with Client(running.url, token="open", handover={"stream": "x"}) as client:
            assert "no 'handover'" in client.hear_until("error")[0]["message"]
        with Client(f"ws://{inside}/v1/streams", token="open") as client:
            assert client.hear_until("error")[0]["fatal"]
        with pytest.raises(InvalidStatus):
            connect(running.url, origin="http://elsewhere.example", proxy=None).__enter__()
    with cluster() as running:
        wanted = urllib.request.Request(f"http://{running.ingress.address}/health", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(wanted)
        assert error.value.code == 403
        error.value.close()


def test_what_the_page_asks_for(cluster):
    with cluster(token="open") as running:
        base = f"http://{running.ingress.address}"

        def read(path, **headers):
            with urllib.request.urlopen(urllib.request.Request(base + path, headers=headers)) as answer:
                return answer.read()

        assert b"<html" in read("/")
        about = json.loads(read("/about.json"))
        assert (about["model"], about["needs_token"]) == ("tiny", True)
        assert json.loads(read("/health")) | {"status": "ok", "replicas": 2} == json.loads(read("/health"))
        assert json.loads(read("/v1/models", Authorization="Bearer open"))["data"][0]["id"] == "tiny"
        assert b"casa_replicas 2.0" in read("/metrics", Authorization="Bearer open")


def test_a_picture_has_a_replica_of_its_own():
    reports = [Report(str(n), f"host:{n}", 10.0, float(n)) for n in range(8)]
    known = Replicas(lambda: reports)
    known.update(reports)
    first = {n: known.for_picture(str(n).encode())[0].name for n in range(200)}
    assert all(sum(name == str(n) for name in first.values()) > 5 for n in range(8))
    known.lost("3")
    # only its own pictures go elsewhere
    for n, name in first.items():
        assert name == "3" or known.for_picture(str(n).encode())[0].name == name
    assert [one.name for one in known.least_busy()] == ["0", "1", "2", "4", "5", "6", "7"]
    known.took("0", 15.0)
    assert known.least_busy()[0].name == "1"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"messages": [{"content": "text"}]}', None),
        (b'{"messages": 3}', None),
        (b'{"messages": [{"content": [{"type": "image_url", "image_url": "a"}]}]}', b"a"),
        (b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "b"}}]}]}', b"b"),
        (b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": 3}}]}]}', None),
    ],
)
def test_a_chats_first_picture(body, found):
    assert first_picture(body) == found
