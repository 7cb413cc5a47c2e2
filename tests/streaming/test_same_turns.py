"""Where every frame is a turn, a picture that is still the same is not asked about again: nothing runs or is kept."""

import pytest

from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.streaming.batch import StepRequest, run_all, run_batch
from casa.testing import noise_frames, tiny_processor, tiny_speaker

ONE, TWO = noise_frames(7, 2)
SHOWN = [ONE, ONE, TWO, TWO, TWO, ONE]
NEW = [True, False, True, False, False, True]


def session(model, processor, **settings):
    return StreamingSession(model, processor, max_new_tokens=6, **settings)


def ways(model):
    """How a session may be given a frame."""

    def in_pieces(one, frame):
        found = one.prepare(frame)
        while isinstance(found, StepRequest):
            ((_, found),) = run_batch(model, [found], lambda: True)
        return one.accept(found)

    return {
        "step": lambda one, frame: one.step(frame),
        "encoded ahead": lambda one, frame: one.step(one.encode(frame)),
        "in pieces": in_pieces,
    }


@pytest.mark.parametrize("way", ["step", "encoded ahead", "in pieces"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, repetition=0.5)], ids=["greedy", "drawn"])
def test_only_pictures_that_differ_are_asked_about(model, turns, same_state, monkeypatch, way, sampling):
    one, other = (session(model, turns, sampling=sampling, seed=3) for _ in range(2))
    wanted = [other.step(frame) for frame, new in zip(SHOWN, NEW, strict=True) if new]
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: passes.append(1) or forward(**inputs))
    said = []
    for frame, new in zip(SHOWN, NEW, strict=True):
        before, usage = len(passes), one.usage
        said.append(ways(model)[way](one, frame))
        assert (len(passes) > before) == new
        assert new or one.usage == usage
    assert [text for text, new in zip(said, NEW, strict=True) if new] == wanted
    assert not any(text for text, new in zip(said, NEW, strict=True) if not new)
    assert (one.frames, other.frames) == (6, 3)
    assert one._earlier == other._earlier
    other.frames = one.frames
    same_state(one, other)


def test_together_with_streams_that_go_on(model, turns, same_state):
    still, moving, first = (session(model, turns, seed=number) for number in range(3))
    alone = session(model, turns, seed=1)
    still.step(ONE)
    moving.step(ONE), alone.step(ONE)
    requests = [still.prepare(ONE), moving.prepare(TWO), first.prepare(ONE)]
    assert [bool(request.tokens) for request in requests] == [False, True, True]
    before = still.usage
    texts = [one.accept(result) for one, result in zip((still, moving, first), run_all(model, requests), strict=True)]
    assert texts[0] == ""
    assert texts[1] == alone.step(TWO)
    assert still.usage == before
    same_state(moving, alone)


def test_a_frame_that_was_encoded_and_never_asked_about_is_new(model, turns):
    one, other = (session(model, turns) for _ in range(2))
    one.step(one.encode(ONE))
    one.encode(TWO)  # dropped
    assert one.prepare(one.encode(TWO)).tokens
    assert one.step(one.encode(TWO)) == [other.step(frame) for frame in (ONE, TWO)][-1]


def test_what_was_cut_by_time_is_asked_about_again(turns):
    model = tiny_speaker()
    one = session(model, turns)
    asked = iter(range(9))
    request = one.prepare(ONE, lambda: next(asked) >= 1)
    (result,) = run_all(model, [request])
    assert not result.complete, "or nothing was cut"
    one.accept(result)
    assert one.prepare(ONE).tokens


def test_captions_of_a_stream_are_not_turns(model):
    one = session(model, tiny_processor())
    one.step(ONE)
    assert one.prepare(ONE).tokens


def test_nothing_is_forgotten_for_a_picture_that_is_the_same(forgetting, turns):
    one = session(forgetting, turns, max_text_tokens=48)
    for frame in [ONE, TWO, ONE, TWO, ONE]:
        one.step(frame)
    held = one.usage
    for _ in range(9):
        assert one.step(ONE) == ""
        assert one.usage == held


def test_a_question_between_does_not_make_a_picture_new(model, turns):
    one = session(model, turns)
    one.step(ONE)
    one.ask("who")
    assert one.step(ONE) == ""
    assert not one.prepare(ONE).tokens
    assert one.fork().prepare(TWO).tokens


def test_an_engine_tells_silence(model, turns):
    engine = StreamingEngine(model, turns)
    engine.open("a", session(model, turns))
    texts = []
    for frame in (ONE, ONE, TWO):
        engine.offer("a", frame)
        texts += [event.text for event in engine.step()]
    assert len(texts) == 3
    assert texts[1] == ""
