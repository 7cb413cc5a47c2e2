"""A bounded session is of one size for ever: also when it is asked about one frame without end."""

from itertools import pairwise

import numpy as np
import pytest

from casa.benchmarks.soak import allowed_bytes
from casa.errors import UserError
from casa.streaming import StreamingEngine, StreamingSession, supports_text_bound
from casa.testing import tiny_processor, tiny_speaker

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 56, 84, 3), dtype=np.uint8)
SETTINGS = {"max_text_tokens": 48, "max_new_tokens": 3}


@pytest.mark.slow
def test_questions_about_one_frame_may_go_on_for_ever(forgetting):
    """In a session of its own, and beside one that watches on; the answers are the same."""
    engine = StreamingEngine(forgetting, tiny_processor())
    sessions = [StreamingSession(forgetting, tiny_processor(), **SETTINGS), engine.open("asked", **SETTINGS)]
    engine.open("watching", **SETTINGS)
    for frame in FRAMES[:3]:
        sessions[0].step(frame)
        engine.offer("asked", frame)
        engine.step()
    images, allowed, windows = sessions[0].usage.image_tokens, allowed_bytes(sessions[0]), []
    for turn in range(24):
        engine.ask("asked", "who")
        engine.offer("watching", FRAMES[turn % 6])
        answers = {event.session: event for event in engine.step()}
        assert {event.error for event in answers.values()} == {None}
        assert answers["asked"].text == sessions[0].ask("who")
        for session in sessions:
            assert session.usage.text_tokens <= 48
            assert session.usage.image_tokens == images, "the frame is still seen"
            assert session.usage.cache_bytes <= allowed
            # and an eighth of the text is free behind it
            assert session.usage.held_bytes <= allowed + session.usage.text_bytes // 8
        windows.append(sessions[0]._cache.windows.text_tokens[0])
    assert max(windows) <= 48
    assert sum(after < before for before, after in pairwise(windows)) > 2, "it began again and again"
    assert sessions[0].step(FRAMES[0]) is not None


@pytest.mark.slow
def test_a_question_is_asked_of_the_window_at_hand_while_there_is_room(forgetting):
    """Up to the bound, a bounded session says what one without says."""
    model, processor = forgetting, tiny_processor()
    wide, free = (StreamingSession(model, processor, max_text_tokens=n, max_new_tokens=3) for n in (96, None))
    for session in (wide, free):
        session.step(FRAMES[0])
    for _ in range(7):
        assert wide.ask("who") == free.ask("who")
        assert wide.usage == free.usage
    assert free.usage.text_tokens > 48


@pytest.mark.parametrize("fusion", [{"method": "insertion"}, {"split": "sample"}], ids=["insertion", "sample"])
def test_a_model_that_keeps_all_text_takes_no_bound(fusion):
    model = tiny_speaker(**fusion)
    assert not supports_text_bound(model)
    with pytest.raises(UserError, match="cannot forget its text; leave max_text_tokens out"):
        StreamingSession(model, tiny_processor(), max_text_tokens=200)
    assert supports_text_bound(tiny_speaker())
