"""Records over budget: made smaller, split or refused by setting, and counted."""

import pytest

from casa.data.record import BadRecord, Message, Origin, Record, Text
from casa.testing import tiny_processor
from casa.training.config import TokenBudget
from casa.training.samples import OversizeSettings, SampleMaker

PROCESSOR = tiny_processor()


def maker(text_budget, image_budget, **choice):
    return SampleMaker(PROCESSOR, TokenBudget(text_budget, image_budget), OversizeSettings(**choice))


def text_of(sample):
    return PROCESSOR.tokenizer.decode(sample.ids)


def test_pictures_are_made_smaller_to_one_bound(chat, picture):
    record = chat(("user", picture(112, 112), picture(56, 28), picture(224, 224), "a"), ("assistant", "b"))
    made = maker(100, 40, images="downscale", min_tokens=4)
    (sample,) = made(record)
    # 16 and 2 stay, 64 gets what is left
    assert [p.tokens for p in sample.pictures] == [16, 2, 16]
    assert sample.image_tokens <= 40
    assert made.counts == {"records": 1, "samples": 1, "downscaled": 1}
    assert sample.pictures[0].max_tokens is None


def test_pictures_are_not_made_smaller_than_allowed(chat, picture):
    record = chat(("user", picture(224, 224), "a"), ("assistant", "b"))
    with pytest.raises(BadRecord, match="64 image tokens; a pack holds 100 and 10"):
        maker(100, 10, min_tokens=16)(record)


def test_turns_are_split_and_keep_their_pictures(chat, picture):
    turns = []
    for number in range(4):
        turns += [("user", *([picture(56, 56)] if number in (0, 2) else []), f"q{number}"), ("assistant", f"a{number}")]
    made = maker(18, 100)
    first, second = made(chat(*turns))
    # the second turn asks about the first one's picture, the fourth, packed with the third, sees that one's
    assert text_of(first) == "<user><frame>q0<end><assistant>a0<end><user>q1<end><assistant>a1<end>"
    assert text_of(second) == "<user><frame>q2<end><assistant>a2<end><user>q3<end><assistant>a3<end>"
    assert (first.part, second.part) == (0, 1)
    assert made.counts == {"records": 1, "samples": 2, "split": 1}


def test_a_turn_without_a_picture_gets_the_first_turns(chat, picture):
    shown = picture(56, 56)
    record = chat(("user", shown, "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    first, second = maker(10, 100)(record)
    assert text_of(second) == "<user><frame>r<end><assistant>b<end>"
    assert second.pictures[0].picture is shown
    assert first.pictures[0].picture is shown


def test_a_split_conversation_shows_a_picture_once(chat, picture):
    shown = picture(56, 56)
    turns = [("user", shown, "q"), ("assistant", "a")]
    for _ in range(5):
        turns += [("user", "r"), ("assistant", "b")]
    samples = maker(20, 100)(chat(*turns))
    assert [len(sample.pictures) for sample in samples] == [1] * len(samples)
    assert "".join(text_of(sample) for sample in samples).count("r<end>") == 5


def test_live_captions_are_split_by_frames(picture):
    parts = []
    for number in range(7):
        parts += [picture(56, 56, number, number / 2), Text("ab", number / 2, number / 2 + 0.2)]
    record = Record((Message("user", (Text("say"),)), Message("assistant", tuple(parts))), Origin("live", 1))
    samples = maker(20, 100)(record)
    assert [len(sample.pictures) for sample in samples] == [3, 3, 1]
    for sample in samples:
        assert text_of(sample) == "<user>say<end><assistant>" + "<frame>ab<end>" * len(sample.pictures)
    shown = [sized.picture.time for sample in samples for sized in sample.pictures]
    assert shown == [number / 2 for number in range(7)]


@pytest.mark.parametrize(
    ("text", "image", "choice"), [(8, 100, {"text": "refuse"}), (100, 20, {"images": "refuse"}), (5, 100, {})]
)
def test_what_may_not_be_mended_is_refused_and_counted(chat, picture, text, image, choice):
    record = chat(("user", picture(112, 112), picture(112, 112), "abc"), ("assistant", "de"))
    made = maker(text, image, **choice)
    with pytest.raises(BadRecord) as refused:
        made(record)
    assert refused.value.reason == "over-budget"
    assert made.counts["refused"] == 1


def test_pictures_are_split_over_samples_where_that_is_asked_for(chat, picture):
    record = chat(
        ("user", picture(112, 112), "a"), ("assistant", "b"), ("user", picture(112, 112), "c"), ("assistant", "d")
    )
    samples = maker(100, 20, images="split")(record)
    assert [sample.image_tokens for sample in samples] == [16, 16]


def test_a_piece_that_is_too_long_by_itself_is_left_out(chat):
    record = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d" * 40))
    made = maker(12, 100)
    (sample,) = made(record)
    assert text_of(sample) == "<user>a<end><assistant>b<end>"
    assert made.counts == {"records": 1, "samples": 1, "split": 1, "pieces refused": 1}


def test_a_system_message_leads_every_piece(chat):
    processor = tiny_processor()
    record = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    alone = SampleMaker(processor, TokenBudget(100, 100))(chat(("system", "s"), ("user", "a"), ("assistant", "b")))[0]
    samples = maker(alone.text_tokens, 100)(record)
    assert [sample.text_tokens for sample in samples] == [alone.text_tokens] * 2
    assert samples[0].ids == alone.ids
