"""Many sessions on one model: each says what it says alone, whoever joins, leaves or brings no picture."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from casa.errors import UserError
from casa.models import FusionConfig, adapt
from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.testing import tiny_backbone, tiny_casa, tiny_encoder, tiny_processor
from casa.testing.tiny import spread

VARIANTS = {
    "parallel": {},
    "replace in sample": {"placement": "replace", "every": 2, "split": "sample"},
    "history": {"history": 1},
    "cross": {"method": "cross_attention"},
    "insertion": {"method": "insertion"},
}


def frames(seed, count, sizes=((56, 84), (28, 28), (84, 56))):
    """Pictures of noise of several sizes."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 255, (*sizes[n % len(sizes)], 3), dtype=np.uint8) for n in range(count)]


def make_model(**fusion):
    model = tiny_casa(**fusion)
    # captions of different lengths, also empty ones: the stop token comes up now and then
    torch.manual_seed(0)
    model.backbone.lm_head.weight.data[2] = model.backbone.lm_head.weight.data[3:].mean(0) * 3
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return make_model(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain():
    return make_model()


SETTINGS = {"max_new_tokens": 5}
STREAMS = {"a": (1, {}), "b": (2, {"prompt": "what"}), "c": (3, {"sampling": Sampling(1.2, 20, 0.9), "seed": 4})}


def alone(model, name, count):
    seed, settings = STREAMS[name]
    session = StreamingSession(model, tiny_processor(), **SETTINGS, **settings)
    return [session.step(frame) for frame in frames(seed, count)]


def same_state(one, other):
    """The sessions hold the same: sizes exactly, keys but for the order of sums."""
    assert one.usage == other.usage
    for mine, theirs in zip(one._cache.text.layers, other._cache.text.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-9, atol=1e-9)


def test_each_session_says_what_it_says_alone(model):
    engine = StreamingEngine(model, tiny_processor())
    heard = {name: [] for name in STREAMS}
    for name, (_, settings) in STREAMS.items():
        engine.open(name, **SETTINGS, **settings)
    for turn in range(4):
        for name, (seed, _) in STREAMS.items():
            assert engine.offer(name, frames(seed, 4)[turn])
        for event in engine.step():
            assert event.error is None
            heard[event.session].append(event.text)
    for name in STREAMS:
        assert heard[name] == alone(model, name, 4), name
    assert len({len(text) for texts in heard.values() for text in texts}) > 1, "captions of different lengths"


def test_all_who_wait_share_one_pass(plain, monkeypatch):
    """Frames of three sizes, in three sessions: one batch per step, not one pass for each."""
    from casa.streaming import engine as module

    sizes, run_together = [], module.run_together

    def counted(model, calls, cut=None):
        sizes.append(len(calls))
        return run_together(model, calls, cut)

    monkeypatch.setattr(module, "run_together", counted)
    engine = StreamingEngine(plain, tiny_processor())
    for name, (_, settings) in STREAMS.items():
        engine.open(name, **SETTINGS, **settings)
    pictures = frames(9, 12)
    for turn in range(4):
        for place, name in enumerate(STREAMS):
            # every session meets every size, and at each turn the three differ
            engine.offer(name, pictures[3 * turn + (turn + place) % 3])
        assert [event.error for event in engine.step()] == [None] * 3
    assert sizes == [3, 3, 3, 3]


def test_state_in_company_is_state_alone(model):
    engine = StreamingEngine(model, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])
    for turn in range(3):
        for name in ("a", "b"):
            engine.offer(name, frames(STREAMS[name][0], 3)[turn])
        engine.step()
    for name in ("a", "b"):
        seed, settings = STREAMS[name]
        session = StreamingSession(model, tiny_processor(), **SETTINGS, **settings)
        for frame in frames(seed, 3):
            session.step(frame)
        same_state(engine.session(name), session)


def test_sessions_join_and_leave_at_any_time(plain):
    engine = StreamingEngine(plain, tiny_processor())
    heard = {name: [] for name in STREAMS}
    joins, leaves = {"a": 0, "b": 2, "c": 1}, {"a": 3, "b": 6, "c": 6}
    for turn in range(6):
        for name, (seed, settings) in STREAMS.items():
            if turn == joins[name]:
                engine.open(name, **SETTINGS, **settings)
            if turn == leaves[name]:
                engine.close(name)
            if joins[name] <= turn < leaves[name]:
                engine.offer(name, frames(seed, 6)[turn - joins[name]])
        for event in engine.step():
            heard[event.session].append(event.text)
    for name in STREAMS:
        assert heard[name] == alone(plain, name, leaves[name] - joins[name])
    assert "a" not in engine
    assert len(engine) == 2


def test_bounded_sessions_forget_in_company_as_alone(plain):
    settings = {"max_text_tokens": 40, "max_new_tokens": 5}
    engine = StreamingEngine(plain, tiny_processor())
    singles = {}
    for name in ("a", "b"):
        engine.open(name, **settings)
        singles[name] = StreamingSession(plain, tiny_processor(), **settings)
    for turn in range(12):
        for name, seed in (("a", 1), ("b", 2)):
            engine.offer(name, frames(seed, 12)[turn])
        said = {event.session: event.text for event in engine.step()}
        for name, seed in (("a", 1), ("b", 2)):
            assert said[name] == singles[name].step(frames(seed, 12)[turn])
            assert engine.session(name).usage.text_tokens <= 40
    assert singles["a"].usage.text_tokens > 20, "the bound was reached"


def test_a_bad_frame_is_that_sessions_own_affair(plain):
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])
    engine.offer("a", "no picture")
    engine.offer("b", frames(2, 1)[0])
    events = {event.session: event for event in engine.step()}
    assert "picture" in events["a"].error or "frame" in events["a"].error
    assert events["b"].error is None
    assert events["b"].text == alone(plain, "b", 1)[0]
    engine.offer("a", frames(1, 1)[0])
    assert engine.step()[0].text == alone(plain, "a", 1)[0], "and it goes on as if nothing had been"


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
            engine.offer(name, frames(STREAMS.get(name, (9,))[0], 3)[turn])
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
    first, second = frames(1, 2)
    engine.offer("a", first)
    (event,) = engine.step()
    assert "MemoryError" in event.error
    assert engine.session("a").usage.image_tokens == 0
    for frame, wanted in zip((first, second), alone(plain, "a", 2), strict=True):
        engine.offer("a", frame)
        assert [event.text for event in engine.step()] == [wanted]


def sliding():
    """A model whose blocks keep the newest 16 tokens of text."""
    backbone = tiny_backbone("mistral")
    backbone.config.sliding_window = 16
    model = adapt(backbone, FusionConfig(), vision=tiny_encoder())
    spread(model.projector)
    model.generation_config.eos_token_id = 2
    return model.eval()


def test_sessions_of_a_model_that_forgets_by_itself_are_themselves_in_company():
    model = sliding()
    engine = StreamingEngine(model, tiny_processor())
    heard = {"a": [], "b": []}
    for turn in range(6):
        for name in heard:
            if turn == (0, 3)["ab".index(name)]:
                engine.open(name, **SETTINGS, **STREAMS[name][1])
            if name in engine:
                engine.offer(name, frames(STREAMS[name][0], 6)[turn - (0, 3)["ab".index(name)]])
        for event in engine.step():
            assert event.error is None
            heard[event.session].append(event.text)
    assert engine.session("a").usage.text_tokens > 16
    assert heard == {"a": alone(model, "a", 6), "b": alone(model, "b", 3)}
    with pytest.raises(UserError, match="sliding-window attention cannot forget"):
        StreamingSession(model, tiny_processor(), max_text_tokens=200)


def test_a_slow_source_keeps_nobody_waiting(plain):
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])
    said = []
    for frame in frames(2, 4):
        engine.offer("b", frame)
        said += engine.step()
    assert [event.text for event in said] == alone(plain, "b", 4)
    engine.offer("a", frames(1, 1)[0])
    assert [event.text for event in engine.step()] == alone(plain, "a", 1)


def test_the_newest_frame_wins_and_the_others_are_counted(plain):
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    first, second, third = frames(1, 3)
    assert engine.offer("a", second)
    assert not engine.offer("a", third)
    assert not engine.offer("a", first)
    assert engine.dropped("a") == 2
    assert [event.text for event in engine.step()] == alone(plain, "a", 1)
    assert engine.step() == []
    assert engine.waiting == 0


def test_a_paused_session_keeps_its_state_and_takes_no_turn(plain):
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    engine.pause("a")
    engine.offer("a", frames(1, 1)[0])
    assert engine.step() == []
    engine.pause("a", False)
    assert [event.text for event in engine.step()] == alone(plain, "a", 1)


def test_no_session_waits_for_ever(plain):
    engine = StreamingEngine(plain, tiny_processor(), most_rows=2)
    for name in STREAMS:
        engine.open(name, **SETTINGS)
    served = []
    for turn in range(3):
        for name, (seed, _) in STREAMS.items():
            engine.offer(name, frames(seed, 3)[turn])
        served.append({event.session for event in engine.step()})
    assert all(len(names) == 2 for names in served)
    assert set().union(*served) == set(STREAMS)


def test_forks_and_saved_sessions_go_on_as_the_first_would(plain, tmp_path):
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    one, two = frames(1, 2)
    engine.offer("a", one)
    engine.step()
    engine.fork("a", "twin")
    engine.save("a", tmp_path / "a.session")
    engine.load("again", tmp_path / "a.session")
    for name in ("a", "twin", "again"):
        engine.offer(name, two)
    assert len({event.text for event in engine.step()}) == 1


def test_questions_are_answered_in_company_as_alone(plain):
    session = StreamingSession(plain, tiny_processor(), **SETTINGS)
    session.step(frames(1, 1)[0])
    wanted = session.ask("who")
    after = session.step(frames(1, 2)[1])
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS)
        engine.offer(name, frames(1, 1)[0])
    engine.step()
    engine.ask("a", "who")
    engine.offer("a", frames(1, 2)[1])
    engine.offer("b", frames(2, 2)[1])
    answers = {(event.session, event.kind): event.text for event in engine.step()}
    assert answers["a", "answer"] == wanted
    assert ("b", "caption") in answers
    assert {event.text for event in engine.step()} == {after}, "then captioning goes on"


def test_each_of_several_questions_has_its_answer(plain):
    session = StreamingSession(plain, tiny_processor(), **SETTINGS)
    session.step(frames(1, 1)[0])
    wanted = [session.ask("who"), session.ask("what is it")]
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    engine.offer("a", frames(1, 1)[0])
    engine.step()
    engine.ask("a", "who")
    engine.ask("a", "what is it")
    assert [event.text for _ in range(2) for event in engine.step()] == wanted
    assert engine.step() == []


def test_a_cut_caption_ends_and_the_next_one_does_not(plain):
    session = StreamingSession(plain, tiny_processor(), max_new_tokens=8)
    whole = StreamingSession(plain, tiny_processor(), max_new_tokens=8).step(frames(1, 1)[0])
    asked = iter([False, False, True])
    short = session.step(frames(1, 1)[0], cut=lambda: next(asked, True))
    assert whole.startswith(short)
    assert len(short) <= 2
    assert session.step(frames(1, 2)[1]) is not None


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda e: e.open("a"), "already"),
        (lambda e: e.offer("x", None), "no session 'x'"),
        (lambda e: e.close("x"), "no session 'x'"),
        (lambda e: [e.open(n) for n in "bc"], "all 2 sessions are taken"),
    ],
)
def test_what_cannot_be_is_refused(plain, act, words):
    engine = StreamingEngine(plain, tiny_processor(), most_sessions=2)
    engine.open("a")
    with pytest.raises(UserError, match=words):
        act(engine)
