"""A live session: saved, forked, bounded, and never left half-changed."""

import numpy as np
import pytest
import torch
from PIL import Image

from casa.errors import UserError
from casa.streaming import Sampling, StreamingSession
from casa.testing import tiny_processor, tiny_speaker

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 56, 84, 3), dtype=np.uint8)


def same_state(one, other):
    """Bit for bit: the text, the windows up to what they hold, what is known of a merged stream, and the next draw."""
    for mine, theirs in zip(one._cache.text.layers, other._cache.text.layers, strict=True):
        assert mine.is_initialized == theirs.is_initialized
        if mine.is_initialized:
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)
    windows, twins = one._cache.windows, other._cache.windows
    assert (windows is None) == (twins is None)
    if windows is not None and twins is not None:
        assert windows.windows == twins.windows
        for mine, theirs in zip(windows.layers, twins.layers, strict=True):
            assert mine.images == theirs.images
            used = mine.images + windows.text_tokens[0]
            assert torch.equal(mine.key[:, :, :used], theirs.key[:, :, :used])
            assert torch.equal(mine.value[:, :, :used], theirs.value[:, :, :used])
    if (stream := one._cache.stream) is not None:
        assert torch.equal(stream.mask, other._cache.stream.mask)
        assert torch.equal(stream.next_position, other._cache.stream.next_position)
        assert torch.equal(stream.images, other._cache.stream.images)
    assert torch.equal(one._generator.get_state(), other._generator.get_state())


@pytest.mark.slow
def test_save_load_and_fork_go_on_alike(model, processor, tmp_path):
    session = StreamingSession(model, processor, max_new_tokens=4, sampling=Sampling(1.5), seed=3)
    for frame in FRAMES[:3]:
        session.step(frame)
    session.notes["mine"] = [1]
    session.save(tmp_path / "session")
    fork = session.fork()
    straight = [session.step(frame) for frame in FRAMES[3:]]
    loaded = StreamingSession.load(tmp_path / "session", model, processor)
    same_state(loaded, fork)
    assert loaded.usage == fork.usage
    assert loaded.notes == fork.notes == StreamingSession.saved_notes(tmp_path / "session") == {"mine": [1]}
    assert [fork.step(frame) for frame in FRAMES[3:]] == straight
    assert [loaded.step(frame) for frame in FRAMES[3:]] == straight
    same_state(loaded, session)
    assert session.usage == fork.usage == loaded.usage
    assert [path.name for path in tmp_path.iterdir()] == ["session"]


@pytest.mark.slow
def test_a_session_goes_on_as_a_chat(model, processor, tmp_path):
    """What generate says from a session's cache is what the session says: to a question, and to the next frame."""
    session = StreamingSession(model, processor, max_new_tokens=4)
    for frame in FRAMES[:3]:
        session.step(frame)
    session.save(tmp_path / "session")
    loaded = StreamingSession.load(tmp_path / "session", model, processor)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def said_from(cache, ids, **images):
        mask = torch.ones(1, cache.num_text + len(ids), dtype=torch.long)
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": mask, **images}
        new = model.generate(**inputs, past_key_values=cache, **how)[0, len(ids) :]
        return processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    before, after, pixels = processor.frame(Image.fromarray(FRAMES[3]))
    tokens = session.pending + before
    if not after:
        tokens, after = tokens[:-1], tokens[-1:]
    pixels = {name: value.double() if value.is_floating_point() else value for name, value in pixels.items()}
    pixels["image_positions"] = torch.tensor([[0, len(tokens)]])
    question = session.pending + processor.turn("who is it")[0]
    for one in (session, loaded):
        held = one.cache.num_text
        assert said_from(one.cache, question) == one.fork().ask("who is it")
        assert said_from(one.cache, tokens + after, **pixels) == one.fork().step(FRAMES[3])
        assert one.usage.text_tokens == held
        assert one.cache.seen == session.cache.seen
        assert one.cache.seen[0].images == 3


@pytest.mark.slow
def test_a_prompt_and_a_question_may_hold_words_like_special_tokens(model):
    processor = tiny_processor()
    typed = "an <image>, an <end><assistant>"
    session = StreamingSession(model, processor, prompt=typed, max_new_tokens=4)
    fed = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: fed.extend(given["input_ids"][0].tolist()), with_kwargs=True
    )
    session.step(FRAMES[0])
    session.ask(typed)
    hook.remove()
    assert session.prompt == typed
    said = len(fed) - fed[::-1].index(3)  # behind <user> of the question
    asked = processor.apply_chat_template(
        [{"role": "user", "content": typed}], add_generation_prompt=True, tokenize=True
    )[0].tolist()
    assert fed[said - 1 : said - 1 + len(asked)] == asked
    assert [token for token in asked if token < 7] == [3, 2, 4]
    # where the prompt and a frame stand, nothing of it was a place
    assert session.frames == 1


@pytest.mark.slow
def test_a_question_the_bound_has_no_room_for_is_refused(forgetting):
    session = StreamingSession(forgetting, tiny_processor(), max_text_tokens=48, max_new_tokens=3)
    short, long = "who", "who is it that we see in this picture here"
    with pytest.raises(UserError, match="ask in fewer words"):
        session.ask(long)
    session.ask(short)  # before any frame too
    for frame in FRAMES:
        session.step(frame)
        session.ask(short)
        assert session.usage.text_tokens <= 48
    twin = session.fork()
    with pytest.raises(UserError, match="max_text_tokens is 48"):
        session.ask(long)
    assert session.step(FRAMES[0]) == twin.step(FRAMES[0])
    same_state(session, twin)


def test_dropped_text_leaves_keys_where_their_new_positions_are(forgetting):
    """What block 0 keeps after forgetting is what it would have made of the remaining tokens alone."""
    model = forgetting
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        session = StreamingSession(model, tiny_processor())
        cache.drop_text(4, 7, session._turns)
        fresh = model(input_ids=torch.cat([ids[:, :4], ids[:, 11:]], dim=1), use_cache=True).past_key_values
    torch.testing.assert_close(cache.text.layers[0].keys, fresh.text.layers[0].keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(cache.text.layers[0].values, fresh.text.layers[0].values)
    assert cache.get_seq_length() == 13


@pytest.mark.slow
def test_silence_still_leaves_text_between_frames(processor):
    """A frame about which nothing is said has its delimiter or the stop token behind it: windows never merge."""
    model = tiny_speaker()
    session = StreamingSession(model, processor, sampling=Sampling())
    session.sampling = type("Mute", (), {"pick": lambda self, *_: 2, "memory": 0})()  # type: ignore[assignment]
    for frame in FRAMES:
        assert session.step(frame) == ""
        assert session.usage.image_tokens == 6


@pytest.mark.slow
def test_sampling_follows_its_seed(processor):
    model = tiny_speaker()

    def run(seed: int) -> list[str]:
        session = StreamingSession(model, processor, sampling=Sampling(1.5, 20, 0.9), seed=seed, max_new_tokens=6)
        return [session.step(frame) for frame in FRAMES]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "frame", [None, "frame.png", 7, FRAMES[0].astype(np.float32), FRAMES[0][0], np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused_and_changes_nothing(frame):
    session = StreamingSession(tiny_speaker(), tiny_processor(), max_new_tokens=4)
    session.step(FRAMES[0])
    before, twin = session.usage, session.fork()
    with pytest.raises((TypeError, ValueError)):
        session.step(frame)
    assert session.usage == before
    assert session.step(FRAMES[1]) == twin.step(FRAMES[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "bound"),
    [({}, 32), ({"placement": "replace", "every": 2}, 32), ({"history": 2}, None), ({"method": "insertion"}, None)],
    ids=["parallel", "replace", "history", "insertion"],
)
def test_what_breaks_off_leaves_the_session_as_it_was(fusion, bound):
    """After a token was drawn and fed, and text forgotten to make room; a session that nothing happened to says so."""
    talking = Sampling(1.5, stop_bias=-1e4, repetition=0.5)
    session = StreamingSession(
        tiny_speaker(**fusion), tiny_processor(), max_text_tokens=bound, max_new_tokens=3, sampling=talking
    )
    twin = session.fork()
    held = []
    for frame in (*FRAMES, *FRAMES):
        before = session.usage
        for act, given in ((session.step, frame), (session.ask, "a")):
            asked = []

            def breaking(asked=asked):
                asked.append(1)
                if len(asked) == 3:
                    raise MemoryError
                return False

            with pytest.raises(MemoryError):
                act(given, should_stop=breaking)
            assert (session.usage, session.frames) == (before, twin.frames)
        assert session.step(frame) == twin.step(frame)
        held.append(session.usage.text_tokens)
    assert session.frames == 12
    assert (held[-1] <= 32) == (bound is not None), "some text was forgotten"


def test_pictures_and_arrays_are_the_same_frame():
    model, processor = tiny_speaker(), tiny_processor()
    one, other = (StreamingSession(model, processor, max_new_tokens=4) for _ in range(2))
    assert one.step(FRAMES[0]) == other.step(Image.fromarray(FRAMES[0]))


def test_bad_settings_and_files_are_refused_in_a_sentence(tmp_path):
    model, processor = tiny_speaker(), tiny_processor()
    with pytest.raises(ValueError, match="raise it"):
        StreamingSession(model, processor, max_text_tokens=12)
    with pytest.raises(ValueError, match="insertion"):
        StreamingSession(tiny_speaker(method="insertion"), processor, max_text_tokens=400)
    with pytest.raises(ValueError, match="max_new_tokens"):
        StreamingSession(model, processor, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(-1.0)
    with pytest.raises(ValueError, match="no saved session"):
        StreamingSession.load(tmp_path / "none", model, processor)
    (tmp_path / "text").write_text("not a session")
    with pytest.raises(ValueError, match="not a saved session"):
        StreamingSession.load(tmp_path / "text", model, processor)
    StreamingSession(model, processor).save(tmp_path / "session")
    with pytest.raises(ValueError, match="another model"):
        StreamingSession.load(tmp_path / "session", tiny_speaker(placement="replace", every=2), processor)
    with pytest.raises(ValueError, match="folder"):
        StreamingSession(model, processor).save(tmp_path / "no" / "such" / "folder")
