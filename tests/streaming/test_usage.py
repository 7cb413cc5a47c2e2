"""What a session holds, counted by tokens and measured in memory: the visible frames, and the text up to its bound."""

from dataclasses import dataclass

import numpy as np
import pytest

from casa.models import FusionConfig, adapt
from casa.streaming import Sampling, StreamingSession, Usage
from casa.testing import tiny_encoder, tiny_processor, tiny_speaker, tiny_text_model

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 56, 84, 3), dtype=np.uint8)
ROOM = 8  # one part in so many is free behind the text, for the text to come
NEAR = 24  # text slots of a window: a delimiter, a short caption and the one before, and room for 16 more


@dataclass(frozen=True)
class Saying(Sampling):
    """So many words, whatever the logits are."""

    words: int = 0

    def pick(self, logits, said, *others):
        return 20 if len(said) < self.words else 2


def token_bytes(model):
    """Bytes of a text token in the text model's cache, and of any token in the windows; keys and values of doubles."""
    config, fused = model.config.text_config, len(model.fused_blocks)
    one = 2 * config.num_key_value_heads * config.head_dim * 8
    kept = config.num_hidden_layers - (fused if model.fusion.placement == "replace" else 0)
    return one * kept, one * fused


@pytest.mark.slow
def test_image_state_is_constant_and_the_cache_grows_by_text_alone(processor):
    model = tiny_speaker()
    session = StreamingSession(model, processor, max_new_tokens=3)
    session.step(FRAMES[0])
    first = session.usage
    text, window = token_bytes(model)
    for number in range(40):
        session.step(FRAMES[number % len(FRAMES)])
        now = session.usage
        assert (now.image_tokens, now.image_bytes) == (first.image_tokens, first.image_bytes)
        assert now.text_bytes == now.text_tokens * text
        assert now.cache_bytes == now.text_bytes + now.image_bytes + now.window_bytes
        assert now.window_bytes <= 6 * window  # a frame's delimiter, its caption and what the frame before left


@pytest.mark.slow
def test_of_120_frames_of_many_sizes_the_memory_is_that_of_the_visible_ones(forgetting):
    """In every layer; the text's memory is the text and an eighth; what windows take beyond images is bounded."""
    session = StreamingSession(forgetting, tiny_processor(), max_new_tokens=8)
    rng = np.random.default_rng(1)
    sizes = [tuple(size) for size in rng.integers(1, 5, (120, 2)).tolist()]
    pictures = {(h, w): rng.integers(0, 255, (28 * h, 28 * w, 3), dtype=np.uint8) for h, w in sizes}
    looked = {size: session.encode(picture) for size, picture in pictures.items()}
    text, window = token_bytes(forgetting)
    for number, size in enumerate(sizes):
        session.sampling = Saying(8 if number % 12 == 0 else 0)
        session.step(looked[size])
        visible = sizes[max(0, number - forgetting.fusion.history) : number + 1]
        images = sum(rows * columns for rows, columns in visible)
        windows = session._cache.windows
        assert windows is not None
        assert [layer.images for layer in windows.layers] == [images] * len(forgetting.fused_blocks)
        now = session.usage
        held = (now.text_tokens + now.text_tokens // ROOM) * text + (images + NEAR) * window
        assert now.cache_bytes <= now.held_bytes <= held


@pytest.mark.slow
def test_a_bound_on_text_holds_for_ever(forgetting):
    """Text never exceeds the bound, and nothing is held but it, its room, the visible frames and their window."""
    session = StreamingSession(forgetting, tiny_processor(), max_text_tokens=32, max_new_tokens=3)
    text, window = token_bytes(forgetting)
    # with history, keys are also held as the open window sees them
    twice = 1.5 if forgetting.fusion.history else 1
    seen = 0
    for number in range(24):
        session.step(FRAMES[number % len(FRAMES)])
        usage = session.usage
        seen = max(seen, usage.text_tokens)
        assert usage.text_tokens <= 32
        assert usage.image_tokens == 6 * min(number + 1, 1 + forgetting.fusion.history)
        assert usage.cache_bytes <= usage.text_tokens * text + (usage.image_tokens + 6) * window
        held = (usage.text_tokens + usage.text_tokens // ROOM) * text + (usage.image_tokens + NEAR) * window * twice
        assert usage.held_bytes <= held
    assert seen > 24, "the bound was reached"


@pytest.fixture(scope="module")
def small():
    """A model of two blocks, for what takes many frames."""
    return adapt(tiny_text_model(num_hidden_layers=2), FusionConfig(), vision=tiny_encoder()).eval()


@pytest.mark.slow
def test_of_300_frames_with_a_bound_the_last_150_take_no_more_memory_than_the_first(small):
    session = StreamingSession(small, tiny_processor(), max_text_tokens=48, max_new_tokens=18)
    # one image token; what it says is long now and then, longer than a window's buffer has room for
    frame = session.encode(np.full((28, 28, 3), 99, dtype=np.uint8))
    held = []
    for number in range(300):
        session.sampling = Saying(18 if number % 25 == 0 else 0)
        session.step(frame)
        held.append(session.usage.held_bytes)
    assert max(held[150:]) <= max(held[:150])
    assert len(set(held)) > 2, "text comes and goes"


def test_room_for_what_comes_makes_no_session_another():
    counted = (3, 6, 100, 50, 40, 10)
    assert Usage(*counted) == Usage(*counted, held_bytes=200) == Usage(*counted, held_bytes=300)
    assert Usage(*counted).held_bytes == 0
