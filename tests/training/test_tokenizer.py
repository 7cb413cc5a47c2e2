"""The tokenizer: any text survives, digits stand alone, and the template is what training writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from casa.errors import UserError
from casa.training.conversation import Writer, without_pictures
from casa.training.tokenizer import SPECIAL, build_tokenizer

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
    bare = without_pictures(sample)
    assert bare.places == ()
    assert all(bare.learn)


def test_it_is_saved_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<user><image><frame>Read line 12.<end>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.chat_template == tokenizer.chat_template
