"""Many sessions on one model: each says what it says alone, whoever joins, leaves or brings no picture."""

import pytest

from casa.errors import UserError
from casa.streaming import Sampling, StreamingEngine, StreamingSession
from casa.streaming.batch import run_all
from casa.testing import noise_frames, tiny_processor, tiny_speaker


@pytest.fixture(scope="module")
def plain():
    return tiny_speaker()


SETTINGS = {"max_new_tokens": 5}
DRAWN = Sampling(1.2, 20, 0.9, repetition=2.0)
STREAMS = {"a": (1, {}), "b": (2, {"prompt": "what"}), "c": (3, {"sampling": DRAWN, "seed": 4})}


def alone(model, name, count):
    seed, settings = STREAMS[name]
    session = StreamingSession(model, tiny_processor(), **SETTINGS, **settings)
    return [session.step(frame) for frame in noise_frames(seed, count)]


@pytest.mark.slow
def test_each_session_says_what_it_says_alone(shared):
    engine = StreamingEngine(shared, tiny_processor())
    heard = {name: [] for name in STREAMS}
    for name, (_, settings) in STREAMS.items():
        engine.open(name, **SETTINGS, **settings)
    for turn in range(4):
        for name, (seed, _) in STREAMS.items():
            assert engine.offer(name, noise_frames(seed, 4)[turn])
        for event in engine.step():
            assert event.error is None
            heard[event.session].append(event.text)
    for name in STREAMS:
        assert heard[name] == alone(shared, name, 4), name
    assert len({len(text) for texts in heard.values() for text in texts}) > 1, "captions of different lengths"


def test_all_who_wait_share_one_batch(plain, monkeypatch):
    """Frames of three sizes, in three sessions: one batch per step, not one pass for each."""
    from casa.streaming import batch

    sizes, run_batch = [], batch.run_batch

    def counted(model, requests, should_yield=None):
        sizes.append(len(requests))
        return run_batch(model, requests, should_yield)

    monkeypatch.setattr(batch, "run_batch", counted)
    engine = StreamingEngine(plain, tiny_processor())
    for name, (_, settings) in STREAMS.items():
        engine.open(name, **SETTINGS, **settings)
    pictures = noise_frames(9, 12)
    for turn in range(4):
        for place, name in enumerate(STREAMS):
            # every session meets every size, and at each turn the three differ
            engine.offer(name, pictures[3 * turn + (turn + place) % 3])
        assert [event.error for event in engine.step()] == [None] * 3
    assert sizes == [3, 3, 3, 3]


@pytest.mark.slow
def test_state_in_company_is_state_alone(shared, same_state):
    engine = StreamingEngine(shared, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])
    for turn in range(3):
        for name in ("a", "b"):
            engine.offer(name, noise_frames(STREAMS[name][0], 3)[turn])
        engine.step()
    for name in ("a", "b"):
        seed, settings = STREAMS[name]
        session = StreamingSession(shared, tiny_processor(), **SETTINGS, **settings)
        for frame in noise_frames(seed, 3):
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
                engine.offer(name, noise_frames(seed, 6)[turn - joins[name]])
        for event in engine.step():
            heard[event.session].append(event.text)
    for name in STREAMS:
        assert heard[name] == alone(plain, name, leaves[name] - joins[name])
    assert "a" not in engine
    assert len(engine) == 2


@pytest.mark.slow
def test_bounded_sessions_forget_in_company_as_alone(forgetting, same_state):
    settings = {"max_text_tokens": 32, "max_new_tokens": 5}
    engine = StreamingEngine(forgetting, tiny_processor())
    singles = {}
    for name in ("a", "b"):
        engine.open(name, **settings)
        singles[name] = StreamingSession(forgetting, tiny_processor(), **settings)
    most = 0
    for turn in range(9):
        for name, seed in (("a", 1), ("b", 2)):
            engine.offer(name, noise_frames(seed, 9)[turn])
        said = {event.session: event.text for event in engine.step()}
        for name, seed in (("a", 1), ("b", 2)):
            assert said[name] == singles[name].step(noise_frames(seed, 9)[turn])
            same_state(engine.session(name), singles[name])
            most = max(most, engine.session(name).usage.text_tokens)
    assert 20 < most <= 32, "the bound was reached"


def test_sessions_of_a_model_that_forgets_by_itself_are_themselves_in_company(sliding):
    model, engine = sliding, StreamingEngine(sliding, tiny_processor())
    heard = {"a": [], "b": []}
    for turn in range(6):
        for name in heard:
            if turn == (0, 3)["ab".index(name)]:
                engine.open(name, **SETTINGS, **STREAMS[name][1])
            if name in engine:
                engine.offer(name, noise_frames(STREAMS[name][0], 6)[turn - (0, 3)["ab".index(name)]])
        for event in engine.step():
            assert event.error is None
            heard[event.session].append(event.text)
    assert engine.session("a").usage.text_tokens > 16
    assert heard == {"a": alone(model, "a", 6), "b": alone(model, "b", 3)}
    with pytest.raises(UserError, match="sliding-window attention cannot forget"):
        StreamingSession(model, tiny_processor(), max_text_tokens=200)


@pytest.mark.parametrize("halt", [None, lambda: True])
def test_of_such_a_model_too_nobody_waits_for_a_long_caption(sliding, halt):
    """Sessions that cannot share a pass take turns, token by token."""
    model, engine = sliding, StreamingEngine(sliding, tiny_processor())
    talking = Sampling(stop_bias=-1e4)
    engine.open("long", max_new_tokens=9, sampling=talking)
    engine.open("short", max_new_tokens=2, sampling=talking)
    told, wanted = [], {}
    for name, most in (("long", 9), ("short", 2)):
        engine.offer(name, noise_frames(1, 1)[0])
        single = StreamingSession(model, tiny_processor(), max_new_tokens=most, sampling=talking)
        wanted[name] = single.step(noise_frames(1, 1)[0])
    while engine.waiting:
        engine.step(should_yield=halt, on_event=told.append)
    assert [(event.session, event.text) for event in told] == [("short", wanted["short"]), ("long", wanted["long"])]


def test_a_slow_source_keeps_nobody_waiting(plain):
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS, **STREAMS[name][1])
    said = []
    for frame in noise_frames(2, 4):
        engine.offer("b", frame)
        said += engine.step()
    assert [event.text for event in said] == alone(plain, "b", 4)
    engine.offer("a", noise_frames(1, 1)[0])
    assert [event.text for event in engine.step()] == alone(plain, "a", 1)


def test_the_newest_frame_wins_and_the_others_are_counted(plain):
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    first, second, third = noise_frames(1, 3)
    assert engine.offer("a", second)
    assert not engine.offer("a", third)
    assert not engine.offer("a", first)
    assert engine.dropped("a") == 2
    assert [event.text for event in engine.step()] == alone(plain, "a", 1)
    assert engine.step() == []
    assert engine.waiting == 0


def test_a_paused_session_keeps_its_state_and_watches_nothing(plain):
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    said = []
    for turn, frame in enumerate(noise_frames(1, 3)):
        engine.pause("a", turn == 2)
        engine.offer("a", frame)
        said += engine.step()
    assert (len(said), engine.waiting, engine.dropped("a")) == (2, 0, 0)
    engine.pause("a", False)
    assert engine.step() == [], "what came meanwhile is passed over"
    engine.offer("a", frame)
    said += engine.step()
    assert [event.text for event in said] == alone(plain, "a", 3)


def test_a_paused_session_still_answers(plain):
    session = StreamingSession(plain, tiny_processor(), **SETTINGS)
    first, second = noise_frames(1, 2)
    wanted = [session.step(first), session.ask("who"), session.step(second)]
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    engine.offer("a", first)
    said = engine.step()
    engine.pause("a")
    engine.offer("a", second)
    engine.ask("a", "who")
    said += engine.step()
    assert [event.kind for event in said] == ["caption", "answer"]
    assert engine.step() == []
    engine.pause("a", False)
    engine.offer("a", second)
    said += engine.step()
    assert [event.text for event in said] == wanted


def test_no_session_waits_for_ever(plain):
    engine = StreamingEngine(plain, tiny_processor(), max_batch_size=2)
    for name in STREAMS:
        engine.open(name, **SETTINGS)
    served = []
    for turn in range(3):
        for name, (seed, _) in STREAMS.items():
            engine.offer(name, noise_frames(seed, 3)[turn])
        served.append({event.session for event in engine.step()})
    assert all(len(names) == 2 for names in served)
    assert set().union(*served) == set(STREAMS)


@pytest.mark.parametrize("first", ["a", "c"])
def test_forks_and_saved_sessions_go_on_as_the_first_would(plain, tmp_path, first):
    """Each by itself, also in what it draws, and in what it takes for repetition."""
    engine = StreamingEngine(plain, tiny_processor())
    seed, settings = STREAMS[first]
    engine.open(first, **SETTINGS, **settings)
    engine.offer(first, noise_frames(seed, 1)[0])
    engine.step()
    engine.fork(first, "twin")
    engine.save(first, tmp_path / "a.session")
    engine.open("again", StreamingSession.load(tmp_path / "a.session", plain, tiny_processor()))
    for frame, wanted in zip(noise_frames(seed, 4)[1:], alone(plain, first, 4)[1:], strict=True):
        for name in (first, "twin", "again"):
            engine.offer(name, frame)
        said = {event.session: (event.text, event.error) for event in engine.step()}
        assert said == dict.fromkeys((first, "twin", "again"), (wanted, None))


def test_questions_are_answered_in_company_as_alone(plain):
    session = StreamingSession(plain, tiny_processor(), **SETTINGS)
    session.step(noise_frames(1, 1)[0])
    wanted = session.ask("who")
    after = session.step(noise_frames(1, 2)[1])
    engine = StreamingEngine(plain, tiny_processor())
    for name in ("a", "b"):
        engine.open(name, **SETTINGS)
        engine.offer(name, noise_frames(1, 1)[0])
    engine.step()
    engine.ask("a", "who")
    engine.offer("a", noise_frames(1, 2)[1])
    engine.offer("b", noise_frames(2, 2)[1])
    answers = {(event.session, event.kind): event.text for event in engine.step()}
    assert answers["a", "answer"] == wanted
    assert ("b", "caption") in answers
    assert {event.text for event in engine.step()} == {after}, "then captioning goes on"


def test_each_of_several_questions_has_its_answer(plain):
    session = StreamingSession(plain, tiny_processor(), **SETTINGS)
    session.step(noise_frames(1, 1)[0])
    wanted = [session.ask("who"), session.ask("what is it")]
    engine = StreamingEngine(plain, tiny_processor())
    engine.open("a", **SETTINGS)
    engine.offer("a", noise_frames(1, 1)[0])
    engine.step()
    engine.ask("a", "who")
    engine.ask("a", "what is it")
    assert [event.text for _ in range(2) for event in engine.step()] == wanted
    assert engine.step() == []


def test_questions_that_wait_are_bounded(plain):
    engine = StreamingEngine(plain, tiny_processor(), max_questions=2)
    for name in ("a", "b"):
        engine.open(name, **SETTINGS)
    for _ in range(2):
        engine.ask("a", "who")
    with pytest.raises(UserError, match="2 questions wait for their answers; ask again later"):
        engine.ask("a", "why")
    engine.ask("b", "who")
    assert [event.error for event in engine.step()] == [None, None]
    engine.ask("a", "why")
    with pytest.raises(UserError, match="max_questions"):
        StreamingEngine(plain, tiny_processor(), max_questions=0)


def test_a_cut_caption_ends_and_the_next_one_does_not(plain, same_state):
    """As that of a twin whose captions may be no longer; the next one has its whole length again."""
    first, second = noise_frames(1, 2)
    session = StreamingSession(plain, tiny_processor(), max_new_tokens=8)
    asked = iter([False, False, True])
    (cut,) = run_all(plain, [session.prepare(first, lambda: next(asked, True))])
    assert (cut.complete, len(cut.tokens)) == (False, 2)
    twin = StreamingSession(plain, tiny_processor(), max_new_tokens=2)
    assert session.accept(cut) == twin.step(first)
    twin.max_new_tokens = 8
    assert session.step(second) == twin.step(second)
    same_state(session, twin)


def test_events_bring_their_tag_and_their_times_and_what_waits_is_known(plain):
    """A frame that replaces another has waited as long as that one; a turn's latency begins with its step."""
    now = [0.0]
    engine = StreamingEngine(plain, tiny_processor(), clock=lambda: now[0], max_batch_size=1)
    for name in ("a", "b"):
        engine.open(name, **SETTINGS)
    first, second = noise_frames(1, 2)
    for now[0], frame, tag in ((1.0, first, "old"), (5.0, second, "new")):
        engine.offer("a", frame, tag)
    now[0] = 6.0
    engine.ask("b", "who", tag=7)
    assert engine.waiting_since() == {"a": 1.0, "b": 6.0}
    now[0] = 8.0
    seen = []

    def should_yield():
        seen.append(engine.waiting_since())
        now[0] = 9.0
        return False

    (event,) = engine.step(should_yield=should_yield)
    assert all(waiting == {"b": 6.0} for waiting in seen)
    assert (event.tag, event.lag, event.latency) == ("new", now[0] - 5.0, now[0] - 8.0)
    (event,) = engine.step()
    assert (event.kind, event.tag, event.lag) == ("answer", 7, now[0] - 6.0)
    engine.offer("a", first)
    engine.pause("a")
    assert engine.waiting_since() == {}


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
    engine = StreamingEngine(plain, tiny_processor(), max_sessions=2)
    engine.open("a")
    with pytest.raises(UserError, match=words):
        act(engine)
