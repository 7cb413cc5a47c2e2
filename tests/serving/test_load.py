"""A machine that is too slow: every stream gets its share and says something of every frame that it watches.

The machine's time is counted, not measured: so many seconds for a picture, so many for a pass of the model.
"""

import asyncio

import pytest

from casa.serving import Limits
from casa.serving.live import LiveStream, Ticket
from casa.serving.metrics import Metrics
from casa.serving.outbox import Outbox
from casa.serving.transcript import Transcript
from casa.serving.worker import Worker
from casa.streaming import Sampling, StreamingEngine
from casa.testing import tiny_processor


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
        self.engine = StreamingEngine(model, tiny_processor(), most_rows=limits.pop("most_rows", 16))
        self.worker = Worker(self.engine, Limits(**limits), clock=lambda: self.now)
        self.streams, self._pictures, self._sent = [], pictures, {}
        self._picture, self._reading = picture, reading

    def open(self, name, fps, words=4, sampling=None):
        """A stream; the future of its opening comes with it."""
        stream = LiveStream(name, fps, Outbox(10**6), Transcript(100), Metrics(), clock=lambda: self.now)
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
                self.worker.offer(stream, Ticket(sent, at, self._pictures[sent % len(self._pictures)], at))
            self._sent[stream] = (since, sent)


def events(stream, kind):
    return [event for event in stream.outbox._events if event["type"] == kind]


@pytest.fixture
def machine(model, pictures):
    """Made within a test's own event loop."""
    return lambda **settings: Machine(model, pictures, **settings)


def in_a_loop(scenario):
    async def run():
        return scenario()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("count", "fps", "picture", "most_rows", "seconds"),
    [
        (8, 2.0, 0.1, 16, 10),  # twice what the machine can do, and more
        (8, 2.0, 0.6, 16, 25),  # a picture alone takes longer than a caption may
        (1, 20.0, 0.1, 16, 5),
        (8, 2.0, 0.1, 3, 10),
    ],
)
def test_each_stream_says_something_of_every_frame_that_it_watches(machine, count, fps, picture, most_rows, seconds):
    def scenario():
        made = machine(picture=picture, most_rows=most_rows)
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
        assert [event["whole"] for event in used] == [said[event["frame"]]["whole"] for event in used]
        assert used[-1]["cut"] == sum(not event["whole"] for event in used) == stream.cut
        offered = made._sent[stream][1]
        assert offered - 3 <= used[-1]["dropped"] + len(used) <= offered
        assert stream.dropped > 0


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
    assert all(event["whole"] and event["cut"] == 0 for event in events(stream, "usage"))
