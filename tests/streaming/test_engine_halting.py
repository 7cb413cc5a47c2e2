"""A step may end in the middle of captions: they go on in the next one, and nothing of what is said changes."""

import random
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.testing import noise_frames, tiny_casa, tiny_processor

SETTINGS = {"max_new_tokens": 6}
STREAMS = {"a": (1, {}), "b": (2, {"prompt": "what"}), "c": (3, {"sampling": Sampling(1.2, 20, 0.9), "seed": 4})}
TALKING = {"max_new_tokens": 6, "sampling": Sampling(stop_bias=-1e4)}  # never stops by itself


@pytest.fixture(scope="module")
def plain():
    return tiny_casa()


def opened(model, **settings):
    """An engine with all streams, and a session of each by itself."""
    engine, singles = StreamingEngine(model, tiny_processor()), {}
    for name, (_, own) in STREAMS.items():
        engine.open(name, **(SETTINGS | own | settings))
        singles[name] = StreamingSession(model, tiny_processor(), **(SETTINGS | own | settings))
    return engine, singles


def at_once():
    return True


@contextmanager
def hooked(model, hook):
    handle = model.register_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.slow
def test_halted_after_every_token_each_says_what_it_says_alone(shared, same_state):
    engine, singles = opened(shared)
    steps = 0
    for turn in range(3):
        wanted = {}
        for name, (seed, _) in STREAMS.items():
            picture = noise_frames(seed, 3)[turn]
            engine.offer(name, picture)
            wanted[name, "caption"] = singles[name].step(picture)
        if turn == 1:
            engine.ask("b", "who")
            # questions come first
            again = StreamingSession(shared, tiny_processor(), **(SETTINGS | STREAMS["b"][1]))
            again.step(noise_frames(2, 3)[0])
            wanted["b", "answer"], wanted["b", "caption"] = again.ask("who"), again.step(noise_frames(2, 3)[1])
            singles["b"] = again
        heard = {}
        while engine.waiting:
            heard |= {(event.session, event.kind): event.text for event in engine.step(should_yield=at_once)}
            steps += 1
        assert heard == wanted
    for name, single in singles.items():
        same_state(engine.session(name), single)
    assert steps > 4, "the captions were halted"


@pytest.mark.slow
def test_frames_that_come_share_a_step_with_what_is_half_said(shared, same_state):
    engine, singles = opened(shared)
    left = {name: noise_frames(seed, 5)[::-1] for name, (seed, _) in STREAMS.items()}
    wanted = {name: [singles[name].step(picture) for picture in left[name][::-1]] for name in STREAMS}
    heard, busy, chance = {name: [] for name in STREAMS}, set(), random.Random(1)
    mixed = False
    while busy or any(left.values()):
        come = {name for name in STREAMS if name not in busy and left[name] and chance.random() < 0.5}
        mixed |= bool(come and busy)
        for name in come:
            engine.offer(name, left[name].pop())
        busy |= come
        for event in engine.step(should_yield=lambda: chance.random() < 0.7):
            heard[event.session].append(event.text)
            busy.discard(event.session)
    assert heard == wanted
    assert mixed
    for name, single in singles.items():
        same_state(engine.session(name), single)


def test_in_the_middle_of_a_caption_a_session_is_as_before_its_frame(plain, tmp_path, same_state):
    single = StreamingSession(plain, tiny_processor(), **TALKING)
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **TALKING)
    first, second = noise_frames(1, 2)
    wanted = [single.step(first), single.step(second)]
    engine.offer("a", first)
    assert [event.text for event in engine.step()] == wanted[:1]
    engine.offer("a", second)
    assert engine.step(should_yield=at_once) == []
    assert (engine.session("a").frames, engine.waiting) == (1, 1)
    engine.fork("a", "twin")
    engine.save("a", tmp_path / "a.session")
    engine.open("again", StreamingSession.load(tmp_path / "a.session", plain, tiny_processor()))
    assert [event.text for event in engine.step()] == wanted[1:]
    for name in ("twin", "again"):
        engine.offer(name, second)
    assert [event.text for event in engine.step()] == wanted[1:] * 2
    for name in ("a", "twin", "again"):
        same_state(engine.session(name), single)


@dataclass(frozen=True)
class Noting(Sampling):
    """Notes before every token how many events have been told by then."""

    told: list = field(default_factory=list)
    noted: list[int] = field(default_factory=list)

    def pick(self, *given):
        self.noted.append(len(self.told))
        return super().pick(*given)


def test_an_event_is_told_as_soon_as_it_is_there(plain):
    engine = StreamingEngine(plain, tiny_processor())
    noting = Noting(stop_bias=-1e4)
    engine.open("short", max_new_tokens=2, sampling=TALKING["sampling"])
    engine.open("long", max_new_tokens=6, sampling=noting)
    for name in ("short", "long"):
        engine.offer(name, noise_frames(1, 1)[0])
    events = engine.step(on_event=noting.told.append)
    # before the pass after the one that it ended with
    assert noting.noted == [0, 0, 0, 1, 1, 1]
    assert [event.session for event in noting.told] == [event.session for event in events] == ["short", "long"]


def test_what_goes_on_is_cut_by_the_step_that_it_goes_on_in(plain, same_state):
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **TALKING)
    engine.offer("a", noise_frames(1, 1)[0])
    assert engine.step(should_yield=at_once) == []
    asked = iter([False])
    (event,) = engine.step(should_stop=lambda: next(asked, True))
    asked = iter([False, False])
    single = StreamingSession(plain, tiny_processor(), **TALKING)
    assert event.text == single.step(noise_frames(1, 1)[0], lambda: next(asked, True))
    assert not event.complete
    same_state(engine.session("a"), single)


@pytest.mark.parametrize("kind", ["caption", "answer"])
def test_a_budget_goes_over_all_steps_that_a_text_takes(plain, same_state, kind):
    """The clock ticks with every pass: three words, whatever steps they are said in."""
    passes = []
    engine = StreamingEngine(plain, tiny_processor(), clock=lambda: len(passes))
    engine.open("a", caption_seconds=3.0, answer_seconds=3.0, **TALKING)
    single = StreamingSession(plain, tiny_processor(), **TALKING)
    frame = noise_frames(1, 1)[0]
    if kind == "answer":
        engine.ask("a", "who")
    else:
        engine.offer("a", frame)
    events = []
    with hooked(plain, lambda *_: passes.append(1)):
        while engine.waiting:
            events += engine.step(should_yield=at_once)
    asked = iter([False] * 3)
    act, given = (single.ask, "who") if kind == "answer" else (single.step, frame)
    assert [(event.text, event.complete) for event in events] == [(act(given, lambda: next(asked, True)), False)]
    same_state(engine.session("a"), single)


def test_what_is_half_said_can_be_dropped(plain):
    single = StreamingSession(plain, tiny_processor(), **TALKING)
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **TALKING)
    first, second = noise_frames(1, 2)
    engine.offer("a", first)
    engine.step(should_yield=at_once)
    engine.offer("a", first)
    engine.ask("a", "who")
    engine.forget("a")
    assert (engine.waiting, engine.step()) == (0, [])
    engine.offer("a", second)
    assert [event.text for event in engine.step()] == [single.step(second)]
    # and whoever leaves takes it along
    engine.offer("a", first)
    engine.step(should_yield=at_once)
    engine.close("a")
    engine.open("a", **TALKING)
    assert (engine.waiting, engine.step()) == (0, [])


@dataclass(frozen=True)
class Stumbling(Sampling):
    """Breaks at the third token, in company and then alone; not a third time."""

    stumbled: list[bool] = field(default_factory=list)

    def pick(self, logits, said, *others):
        if len(said) == 2 and len(self.stumbled) < 2:
            self.stumbled.append(True)
            raise MemoryError
        return super().pick(logits, said, *others)


def test_what_fails_when_it_goes_on_leaves_its_session_as_it_was(plain, same_state):
    engine, singles = opened(plain, **TALKING)
    engine.session("b").sampling = Stumbling(stop_bias=-1e4)
    for name, (seed, _) in STREAMS.items():
        engine.offer(name, noise_frames(seed, 1)[0])
    events = {}
    while engine.waiting:
        events |= {event.session: event for event in engine.step(should_yield=at_once)}
    assert "MemoryError" in events["b"].error
    assert engine.session("b").frames == 0
    engine.offer("b", noise_frames(2, 1)[0])
    events |= {event.session: event for event in engine.step()}
    for name, (seed, _) in STREAMS.items():
        assert (events[name].error, events[name].text) == (None, singles[name].step(noise_frames(seed, 1)[0]))
        same_state(engine.session(name), singles[name])
