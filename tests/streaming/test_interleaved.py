"""What a session picks its words from: to the last logit those of one pass over all text and frames, in float64."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.streaming import Sampling, StreamingSession

STOP = 2


@dataclass(frozen=True)
class Heard(Sampling):
    """Picks as usual, or says nothing at all, and keeps what it picked from what: (logits, token)."""

    mute: bool = False
    picks: list = field(default_factory=list)

    def pick(self, logits, *others):
        token = STOP if self.mute else super().pick(logits, *others)
        self.picks.append((logits, token))
        return token


def noise(seed, rows, columns):
    """A picture of so many image tokens, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 255, (28 * rows, 28 * columns, 3), dtype=np.uint8)


FRAMES = [noise(number, *size) for number, size in enumerate([(2, 3), (1, 1), (3, 2), (2, 3), (1, 4)])]


def told(session, turns):
    """What is said to each frame or question: the text, the tokens picked, and of all of them the logits (n, V)."""
    texts, tokens, scores = [], [], []
    for turn in turns:
        session.sampling.picks.clear()
        texts.append(session.ask(turn) if isinstance(turn, str) else session.step(turn))
        tokens.append([token for _, token in session.sampling.picks])
        scores += [logits for logits, _ in session.sampling.picks]
    return texts, tokens, torch.stack(scores)


def asked(processor, words):
    """The tokens of a user's turn and of what opens the answer to it."""
    chat = [{"role": "user", "content": [{"type": "text", "text": words}]}]
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chat, **given)["input_ids"][0].tolist()


def around(processor):
    """The tokens before and behind a frame: of a whole turn, where each frame is one."""
    if not processor.stream_turns:
        return processor.around_frame()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": processor.stream_prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    before, after = text.split(processor.image_token)
    return tuple(processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))


@torch.no_grad()
def in_one_pass(model, processor, turns, tokens):
    """The logits (n, V) behind which `tokens` were picked, of one pass over the prompt, the turns and what was said."""
    ids, places, pixels, picked_at = asked(processor, processor.stream_prompt), [], [], []
    for turn, said in zip(turns, tokens, strict=True):
        if isinstance(turn, str):
            ids += asked(processor, turn)
        else:
            (before, after), (*_, seen) = around(processor), processor.frame(turn)
            ids += before
            # without a delimiter behind it, a frame stands before the last token that was waiting
            places.append((0, len(ids) if after else len(ids) - 1))
            ids += after
            pixels.append(seen)
        picked_at += range(len(ids) - 1, len(ids) - 1 + len(said))
        ids += [*(token for token in said if token != STOP), STOP]
    images = {name: torch.cat([seen[name] for seen in pixels]) for name in pixels[0]} if pixels else {}
    if pixels:
        images["image_positions"] = torch.tensor(places)
    return model(input_ids=torch.tensor([ids]), use_cache=False, **images).logits[0, picked_at]


def check(model, processor, turns):
    """The captions and answers of a session, once its logits are those of one pass and its words the best of them."""
    session = StreamingSession(model, processor, sampling=Heard(), max_new_tokens=4)
    texts, tokens, logits = told(session, turns)
    wanted = in_one_pass(model, processor, turns, tokens)
    torch.testing.assert_close(logits, wanted, rtol=1e-10, atol=1e-10)
    assert [token for said in tokens for token in said] == wanted.argmax(-1).tolist()
    last = ""
    for turn, text, said in zip(turns, texts, tokens, strict=True):
        words = [token for token in said if token != STOP]
        whole = processor.tokenizer.decode(words, skip_special_tokens=True).strip()
        again = processor.stream_turns and not isinstance(turn, str) and whole == last
        assert text == ("" if again else whole)
        last = last if isinstance(turn, str) else whole
    return texts


@pytest.mark.slow
def test_a_stream_with_a_question_is_one_interleaved_pass(model, processor):
    """The question comes after the second frame, and is answered from it."""
    texts = check(model, processor, [*FRAMES[:2], "who", *FRAMES[2:]])
    assert len(set(texts)) > 1, "or any caption would have done"


@pytest.mark.slow
def test_a_stream_of_turns_asks_with_each_frame(model, processor, monkeypatch):
    """To the logit one pass over the prompt and a turn for each frame."""
    monkeypatch.setattr(processor, "stream_turns", True)
    texts = check(model, processor, [*FRAMES[:2], "who", *FRAMES[2:]])
    assert len(set(texts)) > 1, "or any caption would have done"


def test_a_stream_of_turns_is_silent_where_it_would_say_the_same_again(model, processor, monkeypatch, tmp_path):
    """Also behind a question, and after it was saved; what was said once is said again behind something else."""
    said = iter([*"ab<b<b<b<b<c<b<"])

    class Told(Sampling):
        def pick(self, *given):
            letter = next(said)
            return STOP if letter == "<" else processor.tokenizer.convert_tokens_to_ids(letter)

    monkeypatch.setattr(processor, "stream_turns", True)
    session = StreamingSession(model, processor, sampling=Told(), max_new_tokens=4)
    assert [session.step(frame) for frame in FRAMES[:2]] == ["ab", "b"]
    assert session.step(FRAMES[2]) == ""
    assert session.ask("who") == "b"
    session.save(tmp_path / "session")
    loaded = StreamingSession.load(tmp_path / "session", model, processor)
    loaded.sampling = session.sampling
    assert [loaded.step(frame) for frame in (FRAMES[3], FRAMES[4], FRAMES[0])] == ["", "c", "b"]


frames = st.builds(noise, st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
questions = st.sampled_from(["who", "is it 7?"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["parallel", "replace", "history"], indirect=True)
@settings(max_examples=4, deadline=None)
@given(turns=st.lists(frames | questions, min_size=1, max_size=4))
def test_any_frames_and_questions_are_one_interleaved_pass(model, processor, turns):
    check(model, processor, turns)


@pytest.mark.slow
def test_an_answer_is_given_from_the_frame_at_hand(model, processor):
    """Not only from what the text remembers of it: another frame in the window, and nothing else, makes another one."""
    session = StreamingSession(model, processor, sampling=Heard(mute=True))
    one, other = session.fork(), session.fork()
    one.step(FRAMES[0])
    other.step(FRAMES[3])
    if model.fusion.method != "insertion":
        swapped = one.fork()
        swapped._cache.windows, other = other._cache.windows, swapped
    first, second = (told(asked, ["who"])[2] for asked in (one, other))
    assert float((first - second).abs().max()) > 1e-6
