"""The tokenizer of casa-tiny (any text survives, digits stand alone, the template is what training writes), and packed
rows: every sample once, positions that restart, and a loss on answers alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from casa.errors import UserError
from projects.casa_tiny.chat import IGNORED, SPECIAL, ChatTokens, Writer, build_tokenizer, pack

PAD = 0
TEXTS = ["Read line 2.", "What is digit 3 of line 1?", "4071", "a red star", "Say each new number."] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS, 320)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if any(special in text for special in SPECIAL):
        return
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text.encode("utf-8", "surrogatepass").decode("utf-8")


@settings(max_examples=30, deadline=None)
@given(number=st.text("0123456789", min_size=1, max_size=12))
def test_a_number_is_its_digits(tokenizer: PreTrainedTokenizerFast, number: str) -> None:
    ids = tokenizer.encode(number, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == list(number)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == number


def test_special_tokens_are_whole_and_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.pad_token == "<pad>"


def test_equal_texts_give_equal_tokenizers() -> None:
    assert build_tokenizer(TEXTS, 300).get_vocab() == build_tokenizer(TEXTS, 300).get_vocab()


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="special tokens need 262"):
        build_tokenizer(TEXTS, 100)


def test_the_template_is_what_training_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("Read line 2.", "4071"), ("What is digit 3 of line 1?", "7")]
    picture = {"type": "image"}
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = [picture] if number == 0 else []
        messages += [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert str(text).startswith("<user><image><frame>Read line 2.<end><assistant>4071<end><user>What")
    sample = Writer(tokenizer).dialogue(turns)
    marked = list(sample.ids)
    marked.insert(sample.places[0], tokenizer.convert_tokens_to_ids("<image>"))
    assert tokenizer.decode(marked) == text
    learned = [i for i, learn in zip(sample.ids, sample.learn, strict=True) if learn]
    assert tokenizer.decode(learned) == "4071<end>7<end>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<user><image><frame>Read line 2.<end><assistant>"


def test_a_clip_has_a_picture_before_every_frame_token(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = Writer(tokenizer).clip("Say each new number.", ["", "41", ""])
    frame = tokenizer.convert_tokens_to_ids("<frame>")
    assert [sample.ids[place] for place in sample.places] == [frame] * 3
    assert tokenizer.decode(sample.ids).endswith("<assistant><frame><end><frame>41<end><frame><end>")
    learned = [i for i, learn in zip(sample.ids, sample.learn, strict=True) if learn]
    assert tokenizer.decode(learned) == "<end>41<end><end>"
    bare = sample.as_text()
    assert bare.places == ()
    assert all(bare.learn)


def test_it_is_saved_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<user><image><frame>Read line 12.<end>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.chat_template == tokenizer.chat_template


@st.composite
def samples(draw: st.DrawFn) -> list[ChatTokens]:
    found = []
    for number, length in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))):
        ids = tuple(100 * (number + 1) + i for i in range(length))
        learn = tuple(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        places = tuple(sorted(draw(st.lists(st.integers(0, length - 1), max_size=3))))
        found.append(ChatTokens(ids, learn, places))
    return found


@settings(max_examples=60, deadline=None)
@given(samples(), st.integers(12, 30))
def test_every_sample_stands_whole_in_one_row(given_samples: list[ChatTokens], row_tokens: int) -> None:
    rows = pack(given_samples, row_tokens, PAD)
    assert rows.inputs["input_ids"].shape[1] <= row_tokens
    found = {}
    for row in range(rows.inputs["input_ids"].shape[0]):
        starts = (rows.inputs["position_ids"][row] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], rows.inputs["input_ids"].shape[1]], strict=True):
            assert rows.inputs["position_ids"][row, start:stop].tolist() == list(range(stop - start))
            found[tuple(rows.inputs["input_ids"][row, start:stop].tolist())] = (row, start)
    for index, sample in enumerate(given_samples):
        row, start = found[sample.ids]
        labels = rows.inputs["labels"][row, start : start + len(sample.ids)].tolist()
        wanted = [i if learn else IGNORED for i, learn in zip(sample.ids, sample.learn, strict=True)]
        assert labels == [IGNORED, *wanted[1:]]
        own = [k for k, (owner, _) in enumerate(rows.pictures) if owner == index]
        assert [rows.pictures[k][1] for k in own] == list(range(len(sample.places)))
        assert rows.image_positions[own].tolist() == [[row, start + place] for place in sample.places]
    assert rows.image_positions.tolist() == sorted(rows.image_positions.tolist())
    padding = rows.inputs["input_ids"] == PAD
    assert (rows.inputs["labels"][padding] == IGNORED).all()
    assert int((rows.inputs["labels"] != IGNORED).sum()) == sum(sum(s.learn[1:]) for s in given_samples)


def test_rows_are_filled() -> None:
    row = ChatTokens(tuple(range(1, 6)), (True,) * 5)
    rows = pack([row] * 7, 15, PAD)
    assert rows.inputs["input_ids"].shape == (3, 15)
    assert int((rows.inputs["input_ids"] == PAD).sum()) == 10


@pytest.mark.parametrize("length", [0, 9])
def test_a_sample_must_fit(length: int) -> None:
    with pytest.raises(ValueError, match="a row holds 1 to 8"):
        pack([ChatTokens(tuple(range(length)), (True,) * length)], 8, PAD)


def test_without_pictures() -> None:
    rows = pack([ChatTokens((1, 2), (False, True))], 8, PAD)
    assert rows.image_positions.shape == (0, 2)
    assert rows.image_positions.dtype == torch.int64
