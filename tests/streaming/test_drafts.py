"""What was said of the last frame as a draft for this one: the same words and the same state, in fewer passes."""

from itertools import cycle

import numpy as np
import pytest

from casa.streaming import Sampling, StreamingSession
from casa.streaming.batch import StepRequest, run_all, run_batch
from casa.testing import noise_frames, tiny_processor, tiny_speaker

LONGEST = 6
WRONG = [5, 9, 7]
FRAMES = noise_frames(11, 5)
SAMPLINGS = {"greedy": Sampling(), "drawn": Sampling(temperature=1.5, repetition=0.5, no_repeat_ngram_size=2)}


@pytest.fixture
def passes(model, monkeypatch):
    """The tokens of each pass, per row."""
    counts, forward = [], model.forward

    def count(**inputs):
        counts.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", count)
    return counts


def session(model, processor, drafts=None, **settings):
    """One that is given these drafts in turn; None leaves it its own."""
    made = StreamingSession(model, processor, max_new_tokens=LONGEST, **settings)
    if drafts is not None:
        made._draft = cycle(drafts).__next__
    return made


def step(one: StreamingSession, frame, should_stop=None):
    """The caption with its tokens."""
    (result,) = run_all(one._model, [one.prepare(frame, should_stop)])
    one.accept(result)
    return result.tokens, result.pending, result.complete


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_whatever_the_draft_the_same_is_said(model, turns, same_state, sampling):
    settings = {"sampling": SAMPLINGS[sampling], "seed": 4}
    plain = session(model, turns, [[]], **settings)
    said = [step(plain, frame) for frame in FRAMES]
    right = [tokens for tokens, _, _ in said]
    assert len(set(map(tuple, right))) > 1, "or any words would have done"
    others = {
        "right": right,
        "wrong": [WRONG],
        "begins right": [[*tokens[:2], *WRONG] for tokens in right],
        "too long": [[*tokens, *WRONG][:LONGEST] for tokens in right],
        "too short": [tokens[:1] for tokens in right],
    }
    for drafts in others.values():
        one = session(model, turns, drafts, **settings)
        assert [step(one, frame) for frame in FRAMES] == said
        same_state(one, plain)


def test_only_what_is_new_takes_passes_of_its_own(model, turns, passes):
    """The frame's own pass and one for each token that is not as it was."""
    letters = iter("ab<ab<abc<b<<ab<a<")
    fewest = [3, 1, 2, 2, 1, 3, 1]

    class Told(Sampling):
        def pick(self, *given):
            return 2 if (letter := next(letters)) == "<" else turns.tokenizer.convert_tokens_to_ids(letter)

    one, taken, texts = session(model, turns, sampling=Told()), [], []
    for frame in cycle(FRAMES):
        before = len(passes)
        texts.append(one.step(frame))
        taken.append(len(passes) - before)
        if len(taken) == len(fewest):
            break
    assert texts == ["ab", "", "abc", "b", "", "ab", "a"]
    assert taken == ([3, 3, 4, 2, 1, 3, 2] if model.fusion.method == "insertion" else fewest)


def test_streams_together_draft_each_for_itself(shared, turns, same_state):
    """Drafts of other lengths, right, wrong and none, in one batch."""
    drafts = [[[]], [WRONG], [[*WRONG, *WRONG]], None]
    alone = [session(shared, turns, [[]], seed=number) for number in range(len(drafts))]
    together = [session(shared, turns, draft, seed=number) for number, draft in enumerate(drafts)]
    for at in range(4):
        shown = [FRAMES[(at + number) % 2 if number < 3 else 0] for number in range(len(drafts))]
        wanted = [one.step(frame) for one, frame in zip(alone, shown, strict=True)]
        requests = [one.prepare(frame) for one, frame in zip(together, shown, strict=True)]
        results = list(run_all(shared, requests) if at % 2 else run_in_pieces(shared, requests))
        if shared.fusion.method != "insertion":
            assert len({len(request.draft) for request in requests}) > 1
        assert [one.accept(result) for one, result in zip(together, results, strict=True)] == wanted
        for one, other in zip(together, alone, strict=True):
            same_state(one, other)


def run_in_pieces(model, requests):
    """Each step yields after its first pass."""
    left: dict[int, object] = dict(enumerate(requests))
    while any(isinstance(one, StepRequest) for one in left.values()):
        rows = [row for row, one in left.items() if isinstance(one, StepRequest)]
        for at, found in run_batch(model, [left[row] for row in rows], lambda: True):
            left[rows[at]] = found
    return left.values()


def test_text_is_forgotten_with_drafts_as_without(forgetting, turns, same_state):
    plain, one = (session(forgetting, turns, drafts, max_text_tokens=48) for drafts in ([[]], None))
    for frame in [FRAMES[0], *FRAMES, *FRAMES]:
        assert step(one, frame) == step(plain, frame)
        assert one.prepare(frame).draft
        same_state(one, plain)
    assert one.usage.text_tokens <= 48


def test_a_session_that_was_saved_drafts_what_it_said(turns, tmp_path):
    """In tokens, as they were said: text that is encoded again may be others, or marks of the processor."""
    model, mark = tiny_speaker(), 5

    class Told(Sampling):
        def pick(self, logits, said, *others):
            return [41, mark, 2][len(said)]

    one = session(model, turns, sampling=Told())
    one.step(FRAMES[0])
    one.save(tmp_path / "session")
    loaded = StreamingSession.load(tmp_path / "session", model, turns)
    assert loaded.prepare(FRAMES[1]).draft == one.prepare(FRAMES[1]).draft == [41, mark]
    before = StreamingSession.load(tmp_path / "session", model, tiny_processor())
    assert before.prepare(FRAMES[1]).draft == [], "its frames are no turns"


def test_a_cache_that_slides_takes_nothing_back(sliding, turns):
    plain, one = (session(sliding, turns, drafts) for drafts in ([[]], [WRONG]))
    for frame in [*FRAMES, *FRAMES]:
        assert one.prepare(frame).draft == ()
        assert step(one, frame) == step(plain, frame)


@pytest.mark.parametrize("words", [1, 2, 3])
def test_time_cuts_a_drafted_caption_where_it_cuts_any(turns, same_state, words):
    model = tiny_speaker()
    plain = session(model, turns, [[]])
    right = [step(plain, frame)[0] for frame in FRAMES]

    def cut(drafts):
        one, asked = session(model, turns, drafts), iter(range(99))
        for frame in FRAMES[:2]:
            step(one, frame)
        return step(one, FRAMES[2], lambda: next(asked) >= words), one

    (said, one), (wanted, other) = cut(right), cut([[]])
    assert said == wanted
    assert not said[2], "or nothing was cut"
    same_state(one, other)


def test_a_step_that_yields_goes_on_without_the_draft(turns, same_state):
    model = tiny_speaker()
    plain = session(model, turns, [[]])
    said = [step(plain, frame) for frame in FRAMES]
    one = session(model, turns, [[*tokens[:2], *WRONG] for tokens, _, _ in said])
    for frame, (tokens, *_) in zip(FRAMES, said, strict=True):
        found: object = one.prepare(frame)
        while isinstance(found, StepRequest):
            ((_, found),) = run_batch(model, [found], lambda: True)
        assert found.tokens == tokens
        one.accept(found)
    same_state(one, plain)


def test_a_step_that_is_not_taken_over_leaves_nothing_behind(model, turns, same_state):
    """What is taken back of a draft is taken from the step's own cache."""
    plain, one = (session(model, turns, drafts) for drafts in ([[]], [WRONG]))
    for frame in FRAMES:
        run_all(model, [one.prepare(np.zeros((28, 28, 3), dtype=np.uint8))])
        assert step(one, frame) == step(plain, frame)
        same_state(one, plain)


def test_a_question_and_a_stream_of_captions_have_no_draft(turns):
    model = tiny_speaker()
    one = session(model, turns, [WRONG])
    step(one, FRAMES[0])
    assert one.prepare(FRAMES[1]).draft == WRONG
    assert one.prepare_question("who").draft == ()
    other = session(model, tiny_processor())
    other.step(FRAMES[0])
    assert other.prepare(FRAMES[1]).draft == []
