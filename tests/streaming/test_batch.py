"""Rows of one pass: frames looked at ahead beside others, and budgets of their own. Each is as it is alone."""

from dataclasses import dataclass

import pytest

from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.streaming.batch import run_all
from casa.testing import noise_frames, tiny_casa, tiny_processor

VARIANTS = {
    "parallel": {},
    "replace": {"placement": "replace", "every": 2},
    "history": {"history": 1},
    "cross-attention": {"method": "cross_attention"},
    "compressed": {"compressor": "pool:2"},
    "insertion": {"method": "insertion"},
}


class Talking(Sampling):
    """Never stops by itself, and every token is a letter."""

    def pick(self, logits, *others):
        return 20 + int(logits[20:43].argmax())


TALKING = {"max_new_tokens": 5, "sampling": Talking()}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return tiny_casa(**VARIANTS[request.param])


def talking(model, count):
    return [StreamingSession(model, tiny_processor(), **TALKING) for _ in range(count)]


def after(tokens):
    """A budget that is spent after so many tokens; None never is."""
    asked = iter([False] * (TALKING["max_new_tokens"] + 1 if tokens is None else tokens))
    return lambda: next(asked, True)


@pytest.mark.slow
def test_frames_looked_at_ahead_stand_beside_those_that_were_not(model, same_state):
    sessions, singles = talking(model, 3), talking(model, 3)
    for turn in range(3):
        pictures = [noise_frames(seed, 3)[turn] for seed in range(3)]
        calls = []
        for number, (session, picture) in enumerate(zip(sessions, pictures, strict=True)):
            ahead = (number + turn) % 3 == 0
            calls.append(session.prepare(session.encode(picture) if ahead else picture))
        said = run_all(model, calls)
        heard = [session.accept(one) for session, one in zip(sessions, said, strict=True)]
        assert heard == [single.step(picture) for single, picture in zip(singles, pictures, strict=True)]
    for session, single in zip(sessions, singles, strict=True):
        same_state(session, single)


@pytest.mark.slow
def test_a_budget_that_is_spent_ends_its_own_caption_only(model, same_state):
    sessions, singles = talking(model, 3), talking(model, 3)
    for turn, budgets in enumerate(((1, None, None), (None, 3, None), (4, None, 0), (None, None, None))):
        pictures = [noise_frames(seed, 4)[turn] for seed in range(3)]
        pairs = zip(sessions, pictures, budgets, strict=True)
        said = run_all(model, [session.prepare(picture, after(budget)) for session, picture, budget in pairs])
        assert [one.complete for one in said] == [budget is None for budget in budgets]
        # the first word is said, also of a budget that was never there
        assert [len(one.tokens) for one in said] == [5 if budget is None else max(1, budget) for budget in budgets]
        heard = [session.accept(one) for session, one in zip(sessions, said, strict=True)]
        pairs = zip(singles, pictures, budgets, strict=True)
        assert heard == [single.step(picture, after(budget)) for single, picture, budget in pairs]
    for session, single in zip(sessions, singles, strict=True):
        same_state(session, single)


def test_a_batch_ends_when_every_budget_is_spent():
    """Of an engine, whose clock ticks with every pass: a budget begins with the first token."""
    model, passes = tiny_casa(), []
    engine = StreamingEngine(model, tiny_processor(), clock=lambda: len(passes))
    for seed, (name, seconds) in enumerate({"a": 3, "b": 0, "c": 2}.items()):
        engine.open(name, caption_seconds=seconds, **TALKING)
        engine.offer(name, noise_frames(seed, 1)[0])
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    events = engine.step()
    handle.remove()
    assert len(passes) == 4, "the frames, and the three tokens of a"
    assert [(event.session, event.complete, bool(event.text)) for event in events] == [
        ("a", False, True),
        ("b", False, True),
        ("c", False, True),
    ]


@dataclass(frozen=True)
class Spelling(Sampling):
    """Says these tokens, and then stops."""

    tokens: tuple[int, ...] = ()

    def pick(self, logits, said, *others):
        return (*self.tokens, 2)[len(said)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "said", "whole"),
    [
        ((), 0, True),  # the model's own silence is none of time's doing
        ((20,), 1, False),
        ((20, 21, 22), 1, False),
        ((1, 0, 20, 21), 3, False),  # tokens that show nothing are no word yet
        ((1, 1), 2, True),
    ],
)
@pytest.mark.parametrize("halted", [False, True])
def test_time_cuts_no_caption_before_a_word_of_it_can_be_read(tokens, said, whole, halted):
    engine = StreamingEngine(tiny_casa(), tiny_processor())
    session = engine.open("a", sampling=Spelling(tokens=tokens))
    engine.offer("a", noise_frames(0, 1)[0])
    events = []
    while engine.waiting:
        events += engine.step(should_stop=lambda: True, should_yield=lambda: halted)
    (event,) = events
    assert (event.complete, bool(event.text)) == (whole, said > sum(token < 2 for token in tokens))
    assert session.usage.truncated == (not whole)
    assert session.fork().usage.truncated == (not whole)
