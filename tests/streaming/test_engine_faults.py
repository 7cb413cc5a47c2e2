"""What breaks in one session, or is done to the engine meanwhile, shows in no other session."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.testing import PATIENCE, noise_frames, tiny_casa, tiny_processor

SETTINGS = {"max_new_tokens": 5}
STREAMS = {"a": (1, {}), "b": (2, {"prompt": "what"}), "c": (3, {"sampling": Sampling(1.2, 20, 0.9), "seed": 4})}


@pytest.fixture(scope="module")
def plain():
    return tiny_casa()


def alone(model, name, count):
    seed, settings = STREAMS[name]
    session = StreamingSession(model, tiny_processor(), **SETTINGS, **settings)
    return [session.step(frame) for frame in noise_frames(seed, count)]


def test_a_bad_frame_is_that_sessions_own_affair(plain):
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])
    engine.offer("a", "no picture")
    engine.offer("b", noise_frames(2, 1)[0])
    events = {event.session: event for event in engine.step()}
    assert "picture" in events["a"].error or "frame" in events["a"].error
    assert events["b"].error is None
    assert events["b"].text == alone(plain, "b", 1)[0]
    engine.offer("a", noise_frames(1, 1)[0])
    assert engine.step()[0].text == alone(plain, "a", 1)[0], "and it goes on as if nothing had been"


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_frame_that_breaks_the_processor_is_that_sessions_own_affair(plain, monkeypatch, error):
    processor = tiny_processor()
    frame = processor.frame

    def breaking(image, *known):
        if image.size == (30, 30):
            raise error("no room")
        return frame(image, *known)

    monkeypatch.setattr(processor, "frame", breaking)
    engine = StreamingEngine(plain, processor)
    engine.open("bad", **SETTINGS)
    for name, (_, settings) in STREAMS.items():
        engine.open(name, **SETTINGS, **settings)
    heard = {name: [] for name in STREAMS}
    for turn in range(2):
        engine.offer("bad", np.zeros((30, 30, 3), np.uint8))
        for name, (seed, _) in STREAMS.items():
            engine.offer(name, noise_frames(seed, 2)[turn])
        events = {event.session: event for event in engine.step()}
        assert events.pop("bad").error == f"the model failed at this ({error.__name__}); it was left out."
        for name, event in events.items():
            assert event.error is None
            heard[name].append(event.text)
    assert heard == {name: alone(plain, name, 2) for name in STREAMS}
    engine.offer("bad", noise_frames(1, 1)[0])
    assert [event.text for event in engine.step()] == alone(plain, "a", 1)
    assert engine.session("bad").frames == 1


def test_a_question_or_a_caption_that_breaks_something_is_that_sessions_own_affair(plain, monkeypatch):
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])

    def broken(*_):
        raise KeyError("a template's own")

    first, second = noise_frames(1, 2)
    for turn, (method, kind) in enumerate((("prepare_question", "answer"), ("accept", "caption"))):
        with monkeypatch.context() as patched:
            patched.setattr(engine.session("a"), method, broken)
            if kind == "answer":
                engine.ask("a", "who")
            else:
                engine.offer("a", first)
            engine.offer("b", noise_frames(2, 2)[turn])
            events = {event.session: event for event in engine.step()}
        assert (events["a"].kind, events["a"].text) == (kind, "")
        assert events["a"].error == "the model failed at this (KeyError); it was left out."
        assert (events["b"].error, events["b"].text) == (None, alone(plain, "b", 2)[turn])
    for frame, wanted in zip((first, second), alone(plain, "a", 2), strict=True):
        engine.offer("a", frame)
        assert [event.text for event in engine.step()] == [wanted]


@dataclass(frozen=True)
class Failing(Sampling):
    """A way of picking words that breaks, as memory may."""

    def pick(self, *arguments):
        raise MemoryError


def test_what_fails_in_one_session_is_its_own_affair(plain):
    """Also of what is drawn at random in the others, nothing is lost or drawn twice."""
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("bad", sampling=Failing(), **SETTINGS)
    for name, (_, settings) in STREAMS.items():
        engine.open(name, **SETTINGS, **settings)
    heard = {name: [] for name in STREAMS}
    for turn in range(3):
        for name in ("bad", *STREAMS):
            engine.offer(name, noise_frames(STREAMS.get(name, (9,))[0], 3)[turn])
        events = {event.session: event for event in engine.step()}
        assert "MemoryError" in events.pop("bad").error
        for name, event in events.items():
            assert event.error is None
            heard[name].append(event.text)
    for name in STREAMS:
        assert heard[name] == alone(plain, name, 3), name
    assert engine.session("bad").usage.image_tokens == 0, "as it was before"


@dataclass(frozen=True)
class Stumbling(Sampling):
    """Breaks at the second token, once."""

    stumbled: list[bool] = field(default_factory=list)

    def pick(self, logits, said, *others):
        if said and not self.stumbled:
            self.stumbled.append(True)
            raise MemoryError
        return super().pick(logits, said, *others)


def test_a_session_by_itself_that_fails_is_as_it_was(plain):
    engine = StreamingEngine(plain, tiny_processor())
    settings = SETTINGS | STREAMS["a"][1]
    engine.open("a", sampling=Stumbling(), **settings)
    first, second = noise_frames(1, 2)
    engine.offer("a", first)
    (event,) = engine.step()
    assert "MemoryError" in event.error
    assert engine.session("a").usage.image_tokens == 0
    for frame, wanted in zip((first, second), alone(plain, "a", 2), strict=True):
        engine.offer("a", frame)
        assert [event.text for event in engine.step()] == [wanted]


@dataclass(frozen=True)
class Meanwhile(Sampling):
    """Has something done by another thread, once, while words are being found."""

    act: Callable[[], None] = print
    threads: list[threading.Thread] = field(default_factory=list)

    def pick(self, *arguments):
        if not self.threads:
            self.threads.append(threading.Thread(target=self.act, daemon=True))
            self.threads[0].start()
            self.threads[0].join(PATIENCE)
        return super().pick(*arguments)


def test_what_other_threads_do_in_the_middle_of_a_step(plain):
    engine = StreamingEngine(plain, tiny_processor())
    pictures = {name: noise_frames(seed, 3) for name, (seed, _) in STREAMS.items()}

    def act():
        engine.close("b")
        engine.open("d", **SETTINGS, **STREAMS["b"][1])
        engine.offer("d", pictures["b"][0])
        engine.offer("a", pictures["a"][1])
        engine.offer("c", pictures["c"][1])
        engine.ask("c", "who")

    meanwhile = Meanwhile(act=act)
    singles = {}
    for name, (_, settings) in STREAMS.items():
        singles[name] = StreamingSession(plain, tiny_processor(), **SETTINGS, **settings)
        engine.open(name, **(SETTINGS | settings | ({"sampling": meanwhile} if name == "a" else {})))
        engine.offer(name, pictures[name][0])
    said = [{(event.session, event.kind): event.text for event in engine.step()} for _ in range(4)]
    assert not meanwhile.threads[0].is_alive(), "nobody waited for the step to end"
    first = {name: singles[name].step(pictures[name][0]) for name in STREAMS}
    assert said[0] == {("a", "caption"): first["a"], ("c", "caption"): first["c"]}
    assert said[1] == {
        ("a", "caption"): singles["a"].step(pictures["a"][1]),
        ("c", "answer"): singles["c"].ask("who"),
        ("d", "caption"): first["b"],
    }
    assert said[2:] == [{("c", "caption"): singles["c"].step(pictures["c"][1])}, {}]
