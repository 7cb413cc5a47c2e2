"""The model's thread: streams, jobs and completions in turn; an error ends where it happened."""

import asyncio
import threading
import time
from dataclasses import dataclass, field

import pytest

from casa.errors import UserError
from casa.serving import Limits
from casa.serving.live import LiveStream, Outbox, QueuedFrame, Transcript
from casa.serving.metrics import Metrics
from casa.serving.worker import Worker
from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.testing import PATIENCE, tiny_processor

SETTINGS = {"max_new_tokens": 4}
WORD = 7  # a token that ends nothing


@pytest.fixture
def worker(model, request):
    """With as many rows in a step as a test asks for. What one stream says at once may take a minute."""
    rows = getattr(request, "param", 16)
    engine = StreamingEngine(model, tiny_processor(), max_sessions=3, max_batch_size=rows, max_questions=2)
    made = Worker(engine, Limits(caption_seconds=60.0, answer_seconds=60.0, load=1e9))
    made.start()
    yield made
    made.stop()


def stream(name="a", fps=0.01):
    return LiveStream(name, fps, Outbox(64), Transcript(100), Metrics())


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 60))


async def opened(worker, *names, **settings):
    made = [stream(name) for name in names]
    for one in made:
        await asyncio.wrap_future(worker.open(one, **(SETTINGS | settings)))
    return made


async def hear(one, *kinds):
    """All events up to the first of these kinds."""
    events = [await one.outbox.get()]
    while events[-1]["type"] not in kinds:
        events.append(await one.outbox.get())
    return events


def held(worker):
    """Keeps the model's thread, which has come to wait by now, until the event is set."""
    came, hold = threading.Event(), threading.Event()
    worker.call(lambda: (came.set(), hold.wait()))
    assert came.wait(PATIENCE)
    return hold


def text_of(events):
    return next((event["text"] for event in events if event["type"] == "caption"), "")


def test_streams_say_what_they_say_alone(worker, model, pictures):
    async def scenario():
        streams = await opened(worker, "a", "b", "c")
        heard = {one.name: [] for one in streams}
        for turn in range(3):
            for number, one in enumerate(streams):
                worker.offer(one, QueuedFrame(turn + 1, turn / 2, pictures[3 * number + turn]))
            for one in streams:
                heard[one.name].append(text_of(await hear(one, "usage")))
        return heard

    heard = run(scenario)
    for number, name in enumerate("abc"):
        session = StreamingSession(model, tiny_processor(), **SETTINGS)
        assert heard[name] == [session.step(picture) for picture in pictures[3 * number : 3 * number + 3]]
    assert any(text for texts in heard.values() for text in texts)


def test_the_newest_frame_wins_and_a_pause_takes_none(worker, pictures):
    async def scenario():
        (one,) = await opened(worker, "a")
        hold = held(worker)
        for number in range(5):
            worker.offer(one, QueuedFrame(number + 1, float(number), pictures[number]))
        hold.set()
        events = await hear(one, "usage")
        worker.pause(one, True)
        worker.offer(one, QueuedFrame(6, 5.0, pictures[5]))
        worker.ask(one, "what")
        later = await hear(one, "answer")
        worker.pause(one, False)
        worker.offer(one, QueuedFrame(7, 6.0, pictures[6]))
        return events, later, await hear(one, "usage"), one

    events, later, last, one = run(scenario)
    assert [event["count"] for event in events if event["type"] == "dropped"] == [1, 2, 3, 4]
    assert (events[-1]["frame"], events[-1]["dropped"]) == (5, 4)
    assert [event["type"] for event in later] == ["answer"]
    assert later[0]["time"] == 4.0
    assert last[-1]["frame"] == 7
    assert one.dropped == 4


def test_questions_wait_in_line_and_not_too_many(worker):
    async def scenario():
        (one,) = await opened(worker, "a")
        hold = held(worker)
        worker.ask(one, "one")
        worker.ask(one, "two")
        with pytest.raises(UserError, match="wait"):
            worker.ask(one, "three")
        hold.set()
        return [(await hear(one, "answer"))[-1]["question"] for _ in range(2)]

    assert run(scenario) == ["one", "two"]


def test_an_answer_is_the_sessions_own(worker, model, pictures):
    async def scenario():
        (one,) = await opened(worker, "a")
        worker.offer(one, QueuedFrame(1, 0.0, pictures[0]))
        await hear(one, "usage")
        worker.ask(one, "what")
        return (await hear(one, "answer"))[-1]["text"]

    session = StreamingSession(model, tiny_processor(), **SETTINGS)
    session.step(pictures[0])
    assert run(scenario) == session.ask("what")


def test_what_is_no_picture_ends_in_its_own_stream(worker, pictures):
    async def scenario():
        good, bad = await opened(worker, "good", "bad")
        worker.offer(bad, QueuedFrame(1, 0.0, "no picture"))  # type: ignore[arg-type]
        worker.offer(good, QueuedFrame(1, 0.0, pictures[0]))
        return (await hear(bad, "error"))[-1], (await hear(good, "usage"))[-1]

    error, usage = run(scenario)
    assert not error["fatal"]
    assert usage["frame"] == 1


def test_a_failing_pass_is_told_and_leaves_the_stream_as_it_was(worker, model, pictures, monkeypatch, caplog):
    async def scenario():
        (one,) = await opened(worker, "a")
        worker.offer(one, QueuedFrame(1, 0.0, pictures[0]))
        await hear(one, "usage")
        before = one.session

        def fail(**_):
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(worker.engine, "step", fail)
        worker.offer(one, QueuedFrame(2, 0.5, pictures[1]))
        error = (await hear(one, "error"))[-1]
        worker.offer(one, QueuedFrame(3, 1.0, pictures[0]))
        return error, before is one.session, text_of(await hear(one, "usage"))

    error, same, text = run(scenario)
    assert "MemoryError" in error["message"]
    assert same
    session = StreamingSession(model, tiny_processor(), **SETTINGS)
    session.step(pictures[0])
    assert text == session.step(pictures[0])
    assert worker.is_alive
    assert "failed" in caplog.text


@dataclass(frozen=True)
class Failing(Sampling):
    """Finds no token after so many."""

    after: int = 0

    def pick(self, logits, said, *others):
        if len(said) >= self.after:
            raise RuntimeError("no token")
        return WORD


def test_a_stream_alone_whose_model_fails_once_goes_on_with_its_state(worker, model, pictures):
    async def scenario():
        (one,) = await opened(worker, "a")
        session, heard = one.session, []
        for turn in range(3):
            # at its second token, when the frame is in the cache already
            session.sampling = Failing(after=1) if turn == 1 else Sampling()
            worker.offer(one, QueuedFrame(turn + 1, turn / 2, pictures[turn]))
            heard.append(await hear(one, "usage", "error"))
        return heard, one.session is session

    heard, same = run(scenario)
    assert same
    assert (heard[1][-1]["type"], heard[1][-1]["frame"]) == ("error", 2)
    assert "RuntimeError" in heard[1][-1]["message"]
    session = StreamingSession(model, tiny_processor(), **SETTINGS)
    assert [text_of(heard[0]), text_of(heard[2])] == [session.step(pictures[0]), session.step(pictures[2])]
    usage = {name: heard[2][-1][name] for name in ("text_tokens", "image_tokens", "cache_bytes")}
    assert usage == {name: getattr(session.usage, name) for name in usage}


def test_who_makes_a_shared_pass_fail_fails_alone(worker, model, pictures):
    async def scenario():
        good, bad = await opened(worker, "good", "bad")
        heard = []
        for turn in range(3):
            bad.session.sampling = Failing() if turn == 1 else Sampling()
            hold = held(worker)
            for one in (good, bad):
                worker.offer(one, QueuedFrame(turn + 1, turn / 2, pictures[turn]))
            hold.set()
            heard.append(text_of(await hear(good, "usage")))
            end = (await hear(bad, "usage", "error"))[-1]
            assert (end["type"], end["frame"]) == ("error" if turn == 1 else "usage", turn + 1)
            if turn == 1:
                assert "RuntimeError" in end["message"]
        return heard

    heard = run(scenario)
    session = StreamingSession(model, tiny_processor(), **SETTINGS)
    assert heard == [session.step(picture) for picture in pictures[:3]]


def test_an_event_that_cannot_be_told_is_that_streams_alone(worker, pictures, caplog):
    async def scenario():
        good, bad = await opened(worker, "good", "bad")

        class Broken:
            def frame(self, *_):
                raise ZeroDivisionError

        bad.tally = Broken()
        hold = held(worker)
        for one in (bad, good):
            worker.offer(one, QueuedFrame(1, 0.0, pictures[0]))
        hold.set()
        return (await hear(bad, "error"))[-1], (await hear(good, "usage"))[-1]

    error, usage = run(scenario)
    assert "ZeroDivisionError" in error["message"]
    assert usage["frame"] == 1


def test_full_is_refused_and_closing_makes_room(worker):
    async def scenario():
        streams = await opened(worker, "a", "b", "c")
        with pytest.raises(UserError, match="3 sessions"):
            await asyncio.wrap_future(worker.open(stream("d")))
        await asyncio.wrap_future(worker.close(streams[0]))
        await opened(worker, "d")
        # closing while opening is under way, and twice
        late = stream("e")
        await asyncio.wrap_future(worker.close(streams[1]))
        worker.open(late)
        await asyncio.wrap_future(worker.close(late))
        await asyncio.wrap_future(worker.close(late))
        return worker.streams, len(worker.engine)

    assert run(scenario) == (2, 2)


class Slices:
    """Work of so many slices that notes its turns."""

    def __init__(self, count, turns, name):
        self.left, self.turns, self.name, self.error = count, turns, name, None
        self.made = time.monotonic()

    def advance(self, until):
        assert until > self.made
        self.turns.append(self.name)
        self.left -= 1
        if self.left < 0:
            raise UserError("too far")
        return self.left == 0

    def fail(self, error):
        self.error = error


def test_completions_take_turns(worker, until):
    turns = []
    hold = held(worker)
    works = [Slices(3, turns, "a"), Slices(2, turns, "b"), Slices(0, turns, "c")]
    for work in works:
        worker.chat(work)
    hold.set()
    until(lambda: len(turns) == 6 and worker.chats == 0)
    assert turns == ["a", "b", "c", "a", "b", "a"]
    assert "too far" in str(works[2].error)


def test_streams_have_a_turn_between_the_slices_of_many_chats(worker, pictures, until):
    async def scenario():
        (one,) = await opened(worker, "a")
        turns, order = [], []
        step = worker.engine.step

        def noted(**given):
            order.append(len(turns))
            return step(**given)

        worker.engine.step = noted
        hold = held(worker)
        for name in "bcd":
            worker.chat(Slices(2, turns, name))
        worker.offer(one, QueuedFrame(1, 0.0, pictures[0]))
        worker.ask(one, "what")
        hold.set()
        await hear(one, "usage")
        return order

    # two turns of the stream with one slice in between, not one of each chat
    assert run(scenario) == [0, 1]


def test_it_sleeps_when_there_is_nothing_to_do(worker, monkeypatch):
    rounds = []
    work = worker.work
    monkeypatch.setattr(worker, "work", lambda: rounds.append(1) or work())
    for _ in range(3):
        worker.call(lambda: 1).result(PATIENCE)
    time.sleep(0.2)
    # one round for each job, and the first may have begun before it was counted
    assert len(rounds) <= 3


def test_stopping_cancels_what_waits(model):
    worker = Worker(StreamingEngine(model, tiny_processor()), Limits())
    worker.start()
    hold = held(worker)
    work = Slices(1, [], "a")
    waiting = worker.call(lambda: 1)
    worker.chat(work)
    threading.Timer(0.05, hold.set).start()
    worker.stop()
    assert waiting.cancelled() or waiting.result() == 1
    assert worker.call(lambda: 1).cancelled()
    late = Slices(1, [], "b")
    worker.chat(late)
    assert "stopping" in str(late.error)
    assert not worker.is_alive


@dataclass(frozen=True)
class Endless(Sampling):
    """Never stops before it is `enough`."""

    begun: threading.Event = field(default_factory=threading.Event)
    enough: threading.Event = field(default_factory=threading.Event)

    def pick(self, logits, said, generator, stops=frozenset(), earlier=None):
        self.begun.set()
        return min(stops) if self.enough.is_set() else WORD


def endless(sampling):
    return {"sampling": sampling, "max_new_tokens": 10**6}


def test_each_caption_is_cut_at_its_own_streams_budget_and_told_at_once(worker, pictures):
    async def scenario():
        slow, fast, sampling = stream("slow"), stream("fast", fps=20), Endless()
        for one in (slow, fast):
            await asyncio.wrap_future(worker.open(one, **endless(sampling)))
        hold = held(worker)
        for one in (slow, fast):
            worker.offer(one, QueuedFrame(1, 0.0, pictures[0]))
        hold.set()
        await hear(fast, "usage")
        # nor does the next frame wait for the slow one
        worker.offer(fast, QueuedFrame(2, 0.05, pictures[1]))
        await hear(fast, "usage")
        assert len(slow.outbox) == 0
        sampling.enough.set()
        return await hear(slow, "usage"), [one._metrics.counted("truncated") for one in (slow, fast)]

    events, cut = run(scenario)
    assert cut == [0, 2]
    assert [(event["type"], event["frame"]) for event in events] == [("caption", 1), ("usage", 1)]
    assert events[0]["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("worker", [16, 1], indirect=True)
def test_an_answer_without_end_costs_no_other_stream_its_captions(worker, pictures):
    async def scenario():
        asked, other, sampling = stream("asked"), stream("other", fps=4), Endless()
        await asyncio.wrap_future(worker.open(asked, **endless(sampling)))
        await asyncio.wrap_future(worker.open(other, **SETTINGS))
        worker.ask(asked, "what")
        await asyncio.to_thread(sampling.begun.wait, 60)
        for number in range(1, 4):
            worker.offer(other, QueuedFrame(number, number / 4, pictures[number]))
            assert (await hear(other, "usage"))[-1]["frame"] == number
            assert len(asked.outbox) == 0
        sampling.enough.set()
        return (await hear(asked, "answer"))[-1]

    answer = run(scenario)
    assert answer["complete"]
    assert len(answer["text"]) > 3


def test_who_leaves_in_the_middle_of_an_answer_is_forgotten(worker, pictures):
    async def scenario():
        asked, other, sampling = stream("asked"), stream("other"), Endless()
        await asyncio.wrap_future(worker.open(asked, **endless(sampling)))
        worker.ask(asked, "what")
        await asyncio.to_thread(sampling.begun.wait, 60)
        # neither coming nor going waits for an answer
        await asyncio.wrap_future(worker.open(other, **SETTINGS))
        await asyncio.wrap_future(worker.close(asked))
        worker.offer(other, QueuedFrame(1, 0.0, pictures[0]))
        return text_of(await hear(other, "usage")), len(asked.outbox), len(worker.engine)

    text, told, sessions = run(scenario)
    assert text == StreamingSession(worker.engine.model, tiny_processor(), **SETTINGS).step(pictures[0])
    assert (told, sessions) == (0, 1)
    assert (worker.engine.waiting, worker.chats, len(worker._jobs)) == (0, 0, 0)
