"""A machine that is too slow: every stream gets its share and says something of every frame that it watches.

The machine's time is counted, not measured: so many seconds for a picture, so many for a pass of the model.
"""

import asyncio
import json
import re
import urllib.request
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed

from casa.serving import Limits
from casa.serving.live import LiveStream, Outbox, QueuedFrame, Transcript
from casa.serving.metrics import LoadMeter, Metrics, OverloadedError, probe
from casa.serving.worker import Worker
from casa.streaming import Sampling, StreamingEngine
from casa.testing import PATIENCE, tiny_processor


class Talking(Sampling):
    """Never stops by itself, and every token is a letter."""

    def pick(self, logits, *others):
        return 20 + int(logits[20:43].argmax())


class Machine:
    """A worker whose model takes `picture` s for each frame of a pass and `reading` s for the pass, and cameras that
    send frames in time, whatever the model does.
    """

    def __init__(self, model, pictures, picture=0.1, reading=0.03, **limits):
        self.now = 0.0
        rows = limits.pop("max_batch_size", 16)
        self.engine = StreamingEngine(model, tiny_processor(), max_batch_size=rows, clock=self.clock)
        self.worker = Worker(self.engine, Limits(**limits), clock=self.clock)
        self.streams, self._pictures, self._sent = [], pictures, {}
        self._picture, self._reading = picture, reading

    def clock(self):
        return self.now

    def open(self, name, fps, words=4, sampling=None):
        """A stream; the future of its opening comes with it."""
        stream = LiveStream(
            name, fps, Outbox(10**6), Transcript(100), Metrics(), self.worker.load.recent, clock=self.clock
        )
        opened = self.worker.open(stream, max_new_tokens=words, sampling=sampling or Talking())
        self.worker.work()
        if opened.exception() is None:
            self.streams.append(stream)
            self._sent[stream] = (self.now, 0)
        return stream, opened

    def run(self, seconds):
        """Lets all cameras send for so long."""
        self._end = self.now + seconds
        handle = self.engine.model.register_forward_hook(self._computed, with_kwargs=True)
        try:
            while self.now < self._end:
                self._send()
                before = self.now
                self.worker.work()
                if self.now == before:
                    self.now += 0.01
        finally:
            handle.remove()

    def _computed(self, module, args, given, out):
        self.now += self._reading + self._picture * len(given.get("image_positions", ()))
        self._send()

    def _send(self):
        for stream in self.streams:
            since, sent = self._sent[stream]
            while since + sent / stream.fps <= min(self.now, self._end):
                at = since + sent / stream.fps
                sent += 1
                self.worker.offer(stream, QueuedFrame(sent, at, self._pictures[sent % len(self._pictures)], at))
            self._sent[stream] = (since, sent)


def events(stream, kind):
    return [event for event in stream.outbox._messages if event["type"] == kind]


@pytest.fixture
def machine(model, pictures):
    """Made within a test's own event loop."""
    return lambda **settings: Machine(model, pictures, **settings)


def in_a_loop(scenario):
    async def run():
        return scenario()

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "fps", "picture", "max_batch_size", "seconds", "cut"),
    [
        # twice what the machine can do, and more: frames are dropped, captions have the time that they need
        (8, 2.0, 0.1, 16, 10, False),
        (8, 2.0, 0.6, 16, 25, False),  # a picture alone takes longer than a caption may
        (1, 20.0, 0.1, 16, 5, True),
        (8, 2.0, 0.1, 3, 10, False),
    ],
)
def test_each_stream_says_something_of_every_frame_that_it_watches(
    machine, count, fps, picture, max_batch_size, seconds, cut
):
    def scenario():
        made = machine(picture=picture, max_batch_size=max_batch_size, load=100.0)
        for number in range(count):
            made.open(str(number), fps)
        made.run(seconds)
        return made

    made = in_a_loop(scenario)
    watched = [len(events(stream, "usage")) for stream in made.streams]
    assert min(watched) > 2
    # nobody has more than a frame or two beyond the others
    assert max(watched) - min(watched) <= 2
    for stream in made.streams:
        used = events(stream, "usage")
        said = {event["frame"]: event for event in events(stream, "caption")}
        assert all(event["frame"] in said for event in used)
        assert [event["complete"] for event in used] == [said[event["frame"]]["complete"] for event in used]
        assert used[-1]["truncated"] == sum(not event["complete"] for event in used) == stream.truncated
        offered = made._sent[stream][1]
        assert offered - 3 <= used[-1]["dropped"] + len(used) <= offered
        assert stream.dropped > 0
        assert (stream.truncated > 0) is cut


def test_chats_go_on_where_streams_take_all_there_is(machine):
    class Work:
        seconds = 0.0

        def advance(self, until):
            self.seconds += until - made.now
            made.now = until
            return False

    def scenario():
        nonlocal made
        made = machine(picture=0.6, load=100.0)
        for number in range(8):
            made.open(str(number), 2.0)
        work = Work()
        made.worker.chat(work)
        made.run(30)
        return work.seconds

    made = None
    # of 30 seconds, and something was said of every frame all the same
    assert 2 < in_a_loop(scenario) < 6
    assert all(len(events(stream, "usage")) == len(events(stream, "caption")) > 2 for stream in made.streams)


def test_what_the_model_leaves_unsaid_is_silence_and_no_cut(machine, model, pictures):
    class Silent(Sampling):
        def pick(self, *given):
            return 2

    def scenario():
        made = machine(picture=0.6)
        stream, _ = made.open("a", 20.0, sampling=Silent())
        made.run(10)
        return stream

    stream = in_a_loop(scenario)
    assert events(stream, "usage")
    assert events(stream, "caption") == []
    assert all(event["complete"] and event["truncated"] == 0 for event in events(stream, "usage"))


def refused(opened):
    error = opened.exception()
    assert isinstance(error, OverloadedError)
    return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("tried", [False, True])
def test_no_more_are_let_in_than_the_machine_sustains_and_those_lose_next_to_nothing(machine, model, tried):
    def scenario():
        made = machine(picture=0.1, reading=0.03)
        if tried:
            handle = model.register_forward_hook(made._computed, with_kwargs=True)
            made._end = 0.0
            probe(made.worker.load, model, tiny_processor(), 100.0, made.clock)
            handle.remove()
        turned_away = []
        for number in range(12):
            _, opened = made.open(str(number), 1.0)
            if opened.exception() is not None:
                turned_away.append(refused(opened))
            made.run(3)
        return made, turned_away

    made, turned_away = in_a_loop(scenario)
    # a picture of 0.1 s and five passes of 0.03 s: from 4 frames a second alone to less than 10 in company
    assert 4 <= len(made.streams) < 12
    assert turned_away
    assert "frames a second with this model" in turned_away[0]
    assert f"{len(made.streams)} streams ask for {len(made.streams):.3g} already" in turned_away[-1]
    offered = sum(made._sent[stream][1] for stream in made.streams)
    assert sum(stream.dropped for stream in made.streams) <= 0.05 * offered
    assert not made.worker.load.recent.is_too_much


@pytest.mark.slow
def test_what_would_be_possible_is_said_and_is(machine):
    def scenario():
        made = machine(picture=0.2, reading=0.05)
        assert made.worker.load.report([])["sustained_fps"] is None
        _, opened = made.open("first", 1.5)
        assert opened.result() is None
        made.run(20)
        _, opened = made.open("second", 5.0)
        sentence = refused(opened)
        assert "1 stream asks for 1.5 already" in sentence
        possible = re.search(r"ask for at most ([\d.]+) \(fps\)", sentence)
        _, opened = made.open("second", float(possible[1]))
        assert opened.result() is None
        # all is taken
        _, opened = made.open("third", 0.5)
        sentence = refused(opened)
        assert "at most" not in sentence
        assert "come back when there are fewer streams" in sentence
        made.run(20)
        return made

    made = in_a_loop(scenario)
    assert [stream.name for stream in made.streams] == ["first", "second"]


@pytest.mark.slow
def test_the_first_is_let_in_and_told_what_it_will_lose(machine):
    def scenario():
        made = machine(picture=0.2, reading=0.05)
        one, opened = made.open("one", 20.0)
        assert opened.result() is None, "nothing is known yet"
        made.run(20)
        made.worker.close(one)
        made.streams.clear()
        made.worker.work()
        _, opened = made.open("two", 20.0)
        return one, opened.result(), made.worker.load

    one, sentence, load = in_a_loop(scenario)
    assert "of 20 the others will be dropped" in sentence
    used = events(one, "usage")
    assert re.match(
        r"This machine is too slow for that: of 20 frames a second it watches about [\d.]+", used[-1]["advice"]
    )
    assert "fewer frames a second" in used[-1]["advice"]
    assert load.recent.is_too_much


@pytest.mark.slow
def test_advice_and_overload_end_when_the_machine_keeps_up_again(machine):
    def scenario():
        made = machine(picture=0.6)
        one, _ = made.open("one", 2.0)
        made.run(20)
        over = made.worker.load.recent.is_too_much
        made._picture = made._reading = 0.01
        made.run(90)
        return over, made.worker.load.recent.is_too_much, events(one, "usage")[-1]["advice"]

    assert in_a_loop(scenario) == (True, False, None)


@pytest.mark.slow
def test_frames_that_come_too_soon_are_nobodys_slowness(machine, pictures):
    def scenario():
        made = machine(picture=0.01)
        one, _ = made.open("one", 2.0)
        for _ in range(100):
            one.drop(late=False)
        made.run(5)
        return one, made.worker.load.recent.is_too_much, events(one, "usage")[-1]

    one, over, used = in_a_loop(scenario)
    assert (one.dropped, used["dropped"], used["advice"], over) == (100, 100, None, False)


def test_rates_are_those_of_the_last_minute_and_then_those_tried():
    now = 0.0
    load = LoadMeter(16, clock=lambda: now)
    assert load.sustained(1) is None
    for rows, seconds in ((1, 0.1), (2, 0.15), (4, 0.2), (8, 0.9)):
        load.tried(rows, seconds)
    assert load.sustained(1) == pytest.approx(10)
    assert load.sustained(3) == pytest.approx(1 / 0.0625)
    # the step over eight was disturbed by something
    assert load.sustained(100) == load.sustained(4) == pytest.approx(20)
    load.stepped(0.2, 1, 1)
    # pictures are twice as dear as those that were tried
    assert load.sustained(1) == pytest.approx(5)
    assert load.sustained(4) == pytest.approx(10)
    load.stepped(0.0, 1, 0)
    now = 61.0
    load.stepped(0.5, 1, 0)
    assert load.sustained(1) == pytest.approx(10)


class Cameras:
    """Streams of two frames a second before a model whose step takes `fixed` + `each` s for every stream in it."""

    def __init__(self, fixed, each, tried, rows=16):
        self.now, self.fixed, self.each, self.rows = 0.0, fixed, each, rows
        self.load = LoadMeter(rows, clock=lambda: self.now)
        for size in (1, 2, 4, 8, 16):
            self.load.tried(size, tried[0] + tried[1] * size)
        self.streams = []  # when the next frame comes, and when that came which waits

    def open(self):
        self.streams.append([self.now + 0.37 * len(self.streams) % 0.5, None])

    def lag(self, seconds=8.0):
        """The median time from a frame to its words, of all streams in so many seconds; that of dropped ones counts."""
        end, lags = self.now + seconds, []
        while self.now < end:
            for stream in self.streams:
                while stream[0] <= self.now:
                    lags += [] if stream[1] is None else [1.0]
                    stream[:] = stream[0] + 0.5, stream[0]
            waiting = sorted((one for one in self.streams if one[1] is not None), key=lambda one: one[1])[: self.rows]
            if not waiting:
                self.now = min(one[0] for one in self.streams)
                continue
            took = self.fixed + self.each * len(waiting)
            self.now += took
            self.load.stepped(took, len(waiting), len(waiting))
            for stream in waiting:
                lags.append(self.now - stream[1])
                stream[1] = None
        return sorted(lags)[len(lags) // 2]


@pytest.mark.parametrize(
    ("fixed", "each", "tried"),
    [
        (0.02, 0.02, (0.02, 0.02)),
        (0.001, 0.02, (0.001, 0.02)),
        (0.04, 0.09, (0.02, 0.02)),  # frames that are larger than what was tried: company is worth less
    ],
)
def test_as_many_are_let_in_as_are_in_time(fixed, each, tried):
    """Within a tenth, or one; and so is what the server says that it sustains."""
    open_door, guarded = Cameras(fixed, each, tried), Cameras(fixed, each, tried)
    open_door.open()
    while open_door.lag() <= 0.5:
        open_door.open()
    capacity = len(open_door.streams) - 1
    with suppress(OverloadedError):
        while len(guarded.streams) < 1000:
            guarded.load.admit(2.0, [2.0] * len(guarded.streams))
            guarded.open()
            guarded.lag()
    assert abs(len(guarded.streams) - capacity) <= max(1, 0.1 * capacity)
    sustained = guarded.load.sustained(len(guarded.streams))
    assert sustained is not None
    assert abs(sustained / 2 - capacity) <= max(1, 0.1 * capacity)


@pytest.mark.slow
def test_the_server_says_that_it_is_overloaded(serving, client, frames, monkeypatch):
    def health(server):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=PATIENCE) as answer:
            return json.load(answer)

    with serving() as server, client(server) as one:
        assert one.hello(fps=2.0)["advice"] is None
        one.show(frames[0])
        found = health(server)
        assert (found["status"], found["sessions"], found["chats"]) == ("ok", 1, {"running": 0, "waiting": 0})
        assert found["load"]["sustained_fps"] > 0
        assert (found["load"]["asked_fps"], found["load"]["watched"]) == (2.0, 1)
        server._state.worker.load.recent.count("dropped", 9)
        found = health(server)
        assert (found["status"], found["load"]["dropped"]) == ("overloaded", 9)
        assert "fewer frames a second" in found["message"]
        # one more than the machine sustains
        monkeypatch.setattr(server._state.worker.load, "_share", 1e-9)
        with client(server) as two:
            error = two.hello(fps=2.0)
            assert (error["type"], error["fatal"]) == ("error", True)
            assert "1 stream asks for 2 already" in error["message"]
            with pytest.raises(ConnectionClosed) as closed:
                two.hear()
            assert closed.value.rcvd.code == 1013


@pytest.mark.slow
def test_what_is_tried_at_start_is_known_before_the_first_stream(serving, client):
    with serving(measure_seconds=0.1) as server, client(server) as one:
        one.hello()
        load = server._state.worker.load
        assert load._shape
        assert load.report([])["sustained_fps"] > 0
