"""Conversations as tokens: those that the processor feeds, with answers alone to be learned."""

import pytest
from PIL import Image

from casa import CasaProcessor
from casa.data.bad import BadRecord
from casa.testing import tiny_processor
from casa.training.samples import Budget, SampleMaker

BIG = Budget(10_000, 100_000)
SHIPPED = CasaProcessor.from_pretrained("casa-tiny")


def fed(processor, record):
    """What the processor makes of the same conversation, with blank pictures."""
    from casa.data.record import Picture

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
        for message in record.messages
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
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
    ids, places = fed(processor, record)
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
        ([("user", "a <image> b"), ("assistant", "c")], "tag-without-picture"),
        ([("user", "a"), ("assistant", "b \uf8f0")], "broken-text"),
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
    from casa.data.pictures import Files
    from casa.data.record import Origin
    from casa.data.shapes.context import Context

    shown = [picture().source, picture().source]
    context = Context(Origin("x", 1), Files(tmp_path), SourceSettings("x"))
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
