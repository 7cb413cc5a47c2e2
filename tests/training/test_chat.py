"""Conversations as tokens: those that the processor feeds, with answers alone to be learned."""

import re

import pytest
from PIL import Image

from casa import CasaProcessor
from casa.data.record import BadRecord, Picture
from casa.models import processor_for
from casa.testing import TEMPLATES, TOKENIZERS, tiny_chat_processor, tiny_encoder, tiny_processor, tiny_tokenizer
from casa.training.config import TokenBudget
from casa.training.samples import SampleMaker

BIG = TokenBudget(10_000, 100_000)
SHIPPED = CasaProcessor.from_pretrained("casa-tiny")


def fed(processor, messages, **how):
    """What the processor makes of the same conversation, with blank pictures."""
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": Image.new("RGB", (56, 56))}
                if isinstance(part, Picture)
                else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **how)
    places = inputs["image_positions"][:, 1].tolist() if "image_positions" in inputs else []
    return inputs["input_ids"][0].tolist(), places


def learned(sample, processor):
    ids = [token for token, learn in zip(sample.ids, sample.learn, strict=True) if learn]
    return processor.tokenizer.decode(ids)


@pytest.fixture(params=["delimited", "plain", "casa-tiny"])
def processor(request):
    return SHIPPED if request.param == "casa-tiny" else tiny_processor(request.param == "delimited")


def test_a_conversation_is_what_the_processor_feeds(processor, chat, picture):
    record = chat(
        ("user", picture(), "read line 1"),
        ("assistant", "407"),
        ("user", "and ", picture(28, 56, 1), " this"),
        ("assistant", "12"),
    )
    sample = SampleMaker(processor, BIG)(record)[0]
    ids, places = fed(processor, record.messages)
    assert list(sample.ids) == ids
    assert list(sample.places) == places
    assert learned(sample, processor).replace(" ", "") == "407<end>12<end>"


def test_what_follows_the_last_answer_is_left_out(processor, chat, picture):
    record = chat(("user", picture(), "read"), ("assistant", "4"), ("user", picture(), "thanks"))
    sample = SampleMaker(processor, BIG)(record)[0]
    assert len(sample.pictures) == 1
    assert sample.learn[-1]


def test_a_template_without_stop_tokens_gets_one_behind_the_last_answer(chat):
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace("<end>", " ")
    record = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    sample = SampleMaker(processor, BIG)(record)[0]
    assert processor.tokenizer.decode(sample.ids) == "<user>a <assistant>b <user>c <assistant>d<end>"
    assert learned(sample, processor) == "bd<end>"


def test_text_with_a_line_break_before_the_stop_token_learns_both(chat):
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace("<end>", " <end>")
    sample = SampleMaker(processor, BIG)(chat(("user", "a"), ("assistant", "b")))[0]
    assert learned(sample, processor) == "b <end>"


def test_an_assistant_may_show_pictures_too(chat, picture):
    processor = tiny_processor()
    sample = SampleMaker(processor, BIG)(chat(("user", "a"), ("assistant", "b", picture(), "c")))[0]
    assert processor.tokenizer.decode(sample.ids) == "<user>a<end><assistant>b<frame>c<end>"
    assert sample.places == (5,)
    assert learned(sample, processor) == "bc<end>"


def test_gist_tokens_follow_pictures_and_are_not_learned(chat, picture):
    processor = tiny_processor()
    processor.gist_ids = [61, 62]
    sample = SampleMaker(processor, BIG)(chat(("user", picture(), "a"), ("assistant", "b")))[0]
    assert sample.ids[:4] == (3, 61, 62, 6)
    assert sample.places == (1,)
    assert sum(sample.learn) == 2


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "a"), ("assistant", "  ")], "empty-answer"),
        ([("user", "a")], "empty-answer"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(chat, turns, reason):
    with pytest.raises(BadRecord) as refused:
        SampleMaker(tiny_processor(), BIG)(chat(*turns))
    assert refused.value.reason == reason


def test_a_template_that_refuses_is_a_bad_record(chat):
    processor = tiny_processor()
    processor.chat_template = "{{ raise_exception('roles must alternate') }} image"
    with pytest.raises(BadRecord, match="roles must alternate"):
        SampleMaker(processor, BIG)(chat(("user", "a"), ("assistant", "b")))


@pytest.mark.parametrize("answer", ["🙂 يقرأ", "日本", "e\u0301"])
def test_any_script_is_learned_whole(chat, answer):
    sample = SampleMaker(SHIPPED, BIG)(chat(("user", "a 🙂"), ("assistant", answer)))[0]
    first = sample.learn.index(True)
    assert all(sample.learn[first:])
    wanted = SHIPPED.tokenizer.encode(answer + "<end>", add_special_tokens=False)
    assert list(sample.ids[first:]) == wanted


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("Compare <image> and <image>.", ["Compare ", None, " and ", None, "."]),
        ("<image>\n<image>\nWhich one?", [None, None, "Which one?"]),
        ("Here: <image>, there: <image>", ["Here: ", None, ", there: ", None]),
    ],
)
@pytest.mark.parametrize("processor", [SHIPPED, tiny_processor()], ids=["shipped", "tiny"])
def test_a_row_is_trained_as_the_same_chat_is_asked(tmp_path, picture, processor, content, parts):
    from casa.data import SourceSettings, parse_row
    from casa.data.pictures import RowContext
    from casa.data.record import Origin

    shown = [picture().source, picture().source]
    context = RowContext(Origin("x", 1), SourceSettings("x"), tmp_path)
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}], "images": shown}
    sample = SampleMaker(processor, BIG)(parse_row(row, context))[0]
    asked = [
        {"type": "text", "text": p} if p else {"type": "image", "image": Image.new("RGB", (56, 56))} for p in parts
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = inputs["input_ids"][0].tolist()
    assert list(sample.ids[: len(ids)]) == ids
    assert list(sample.places) == inputs["image_positions"][:, 1].tolist()
    assert not any(sample.learn[: len(ids)])


def test_an_answer_that_is_not_to_be_learned_is_read(chat):
    from dataclasses import replace

    record = chat(("user", "a"), ("assistant", "12"), ("user", "b"), ("assistant", "34"))
    whole = SampleMaker(SHIPPED, BIG)(record)[0]
    first, second = (n for n, message in enumerate(record.messages) if message.role == "assistant")
    for left_out, said in ((first, "34<end>"), (second, "12<end>")):
        messages = [replace(m, learn=n != left_out) for n, m in enumerate(record.messages)]
        sample = SampleMaker(SHIPPED, BIG)(replace(record, messages=tuple(messages)))[0]
        assert learned(sample, SHIPPED) == said
        assert sample.ids == whole.ids[: len(sample.ids)]


# what is learned begins where a model is asked

LEARNED = {  # of one turn, and of the first of two, with tokens of bytes
    "chatml": ("407<end>", "407<end>"),
    "places": ("407<end>", "407<end>"),
    "parts": (" 407<end>", " 407<end>"),
    "gemma": ("407<end>", "407<end>"),
    "refusing": (" 407</s>", " 407</s>"),
    "thinking": ("<think>\n\n</think>\n\n407<end>", "407<end>"),
    "opened": ("407<end>", "407<end>"),
    "blank": ("407</s>", " 407"),
}
NOTED = {
    "thinking": ["answers of earlier turns otherwise"],
    "opened": ["generation prompt ends with '<think>"],
    "blank": ["no token that ends an answer", "joins the end of the generation prompt"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_is_learned_from_as_it_is_asked(kind, chat, picture):
    """One turn or two: the tokens before the last answer are those that a model is given."""
    turns = [
        ("user", picture(), "Read line 2 "),
        ("assistant", "407"),
        ("user", "and <image>?"),
        ("assistant", "It is 12."),
    ]
    for name in TEMPLATES:
        processor = tiny_chat_processor(kind, name)
        maker = SampleMaker(processor, BIG)
        for count in (2, 4):
            record = chat(*turns[:count])
            sample = maker(record)[0]
            ids, places = fed(processor, record.messages[:-1], add_generation_prompt=True)
            length = len(ids)
            assert list(sample.ids[:length]) == ids, name
            assert list(sample.places) == places == [places[0]]
            # all behind it is learned, and says the answer
            assert all(sample.learn[length:]), name
            assert any(sample.learn[:length]) == (count == 4)
            said = processor.tokenizer.decode(sample.ids[length:], skip_special_tokens=True)
            wanted = processor.tokenizer.decode(processor.tokenizer.encode(turns[count - 1][1]))
            assert said.replace("<think>\n\n</think>", "").split() == wanted.split() or kind in ("bert", "words"), name
            assert sample.ids[-1] in (3, 6)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_learned_from_the_end_of_the_prompt_to_its_stop(name, chat):
    processor = tiny_chat_processor("gpt2", name)
    maker = SampleMaker(processor, BIG)
    last, earlier = LEARNED[name]
    assert learned(maker(chat(("user", "line"), ("assistant", " 407\n")))[0], processor) == last
    two = maker(chat(("user", "line"), ("assistant", "407"), ("user", "and"), ("assistant", "407")))[0]
    assert learned(two, processor) == earlier + last
    assert len(maker.notes) == len(NOTED.get(name, []))
    assert all(re.search(said, note) for said, note in zip(NOTED.get(name, []), maker.notes, strict=True))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_that_people_type_are_not_learned(kind, chat, picture):
    processor = tiny_chat_processor(kind)
    typed = "an <end> and <image>, </s><user>"
    plain = SampleMaker(processor, BIG)(chat(("user", picture(), "a"), ("assistant", "b")))[0]
    record = chat(("user", f"{typed} is ", picture(), typed), ("assistant", typed))
    sample = SampleMaker(processor, BIG)(record)[0]
    special = range(1, 8)
    found, wanted = ([token for token in made.ids if token in special] for made in (sample, plain))
    assert found == wanted
    assert len(sample.places) == 1
    assert list(sample.ids) == fed(processor, record.messages)[0][: len(sample.ids)]
    if kind == "gpt2":
        assert learned(sample, processor) == f"{typed}<end>"


def test_private_spellings_and_marks_do_not_meet(chat, monkeypatch):
    """The spelling is drawn by chance: here it is of the very characters that marks are taken from first."""
    monkeypatch.setattr("casa.models.chat_template.secrets.randbelow", lambda count: 0)
    processor = tiny_chat_processor("gpt2", "chatml")
    sample = SampleMaker(processor, BIG)(chat(("user", "line"), ("assistant", "407")))[0]
    assert learned(sample, processor) == "407<end>"


def test_captions_and_private_characters_are_text_too(chat):
    for words in ("a \uf8f0 \ue001", "<image>", "<end><assistant>"):
        sample = SampleMaker(SHIPPED, BIG)(chat(("user", "what"), ("assistant", words)))[0]
        assert learned(sample, SHIPPED) == f"{words}<end>"
        assert sum(token == SHIPPED.tokenizer.eos_token_id for token in sample.ids) == 2


def test_the_blank_behind_the_plain_prompt_is_learned_and_every_answers_end(chat):
    """Before digits it is a token of its own for many tokenizers, and the first thing that a model has to say."""
    processor = processor_for(tiny_tokenizer("first"), tiny_encoder().config)
    record = chat(("user", "line"), ("assistant", "4"), ("user", "line"), ("assistant", "5"))
    maker = SampleMaker(processor, BIG)
    sample = maker(record)[0]
    names = processor.tokenizer.convert_ids_to_tokens(list(sample.ids))
    said = [name for name, learn in zip(names, sample.learn, strict=True) if learn]
    assert said == ["▁", "4", "</s>", "▁", "5", "</s>"]
    given, _ = fed(processor, record.messages[:-1], add_generation_prompt=True)
    assert (list(sample.ids[:-3]), names[len(given) - 1]) == (given, ":")
    assert maker.notes == ()


def test_a_token_that_spans_the_prompts_end_is_encoded_behind_it(chat):
    """Bytes join a blank and a number: a model that is asked has been given the blank already."""
    processor = tiny_chat_processor("gpt2", TEMPLATES["blank"].replace("\n{% endfor", "<end>\n{% endfor"))
    maker = SampleMaker(processor, BIG)
    assert ["joins the end" in note for note in maker.notes] == [True]
    record = chat(("user", "line"), ("assistant", "407"))
    sample = maker(record)[0]
    whole, _ = fed(processor, record.messages)
    given, _ = fed(processor, record.messages[:1], add_generation_prompt=True)
    assert whole[: len(given)] != given
    assert list(sample.ids[: len(given)]) == given
    assert processor.tokenizer.decode(sample.ids) == processor.tokenizer.decode(whole).rstrip("\n")


def test_an_answer_without_a_question_is_learned(chat):
    for name in ("chatml", "blank", "parts"):
        processor = tiny_chat_processor("gpt2", name)
        assert learned(SampleMaker(processor, BIG)(chat(("assistant", "407")))[0], processor).strip().startswith("407")


def test_a_template_that_loses_an_answer_is_a_bad_record(chat):
    processor = tiny_chat_processor(template="{% if messages | length == 1 %}" + TEMPLATES["chatml"] + "{% endif %}")
    with pytest.raises(BadRecord, match="leaves the last answer out"):
        SampleMaker(processor, BIG)(chat(("user", "a"), ("assistant", "b")))
    processor = tiny_chat_processor(template="{{ messages[0].content + 1 }}")
    with pytest.raises(BadRecord, match="chat template fails"):
        SampleMaker(processor, BIG)(chat(("user", "a"), ("assistant", "b")))
