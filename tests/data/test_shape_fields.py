"""Fields that change what is learned are followed or refused by name, in every shape; notes pass."""

import pytest

from casa.data import BadRecord, parse_row

SHAPED = {
    "chat": lambda **m: {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **m}, *LATER]
    },
    "llava": lambda **m: {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **m}, *LATER]
    },
    "finevision": lambda **m: {
        "texts": [{"user": "a", "assistant": "b", **m}, {"user": "c", "assistant": "d"}], "images": []
    },
}  # fmt: skip
LATER = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
ROWS = {
    **{name: shaped() for name, shaped in SHAPED.items()},
    "vqa": {"question": "a", "answer": "b"},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "caption": {"image": "a.png", "caption": "b"},
    "live-whisperx": {"video": "v.mp4", "words": [[0.1, 0.2, "b"]]},
    "llava-video": {"video": "v.mp4", "conversations": [
        {"from": "human", "value": "<video>a"}, {"from": "gpt", "value": "b"}]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def video(root):
    (root / "v.mp4").write_bytes(b"video")


@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize(
    ("field", "learn"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": None}, True),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"loss": 1}, True),
        ({"id": 7, "source": "x", "score": 0.2, "timestamp": "now"}, True),
        ({"tool_calls": [], "name": None, "refusal": None, "reasoning_content": "", "audio": None}, True),
        ({"function_call": {"name": None, "arguments": None}}, True),
    ],
)
def test_an_answer_is_learned_unless_it_says_not(context, shape, field, learn):
    answers = [m.learn for m in parse_row(SHAPED[shape](**field), context()).messages if m.role == "assistant"]
    assert answers == [learn, True]


@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize(
    "field",
    [
        {"weight": 0.5},
        {"weight": "0"},
        {"train": "no"},
        {"loss": 0.37},
        {"mask": 0},
        {"mask": True},
        {"tool_calls": [{"type": "function"}]},
        {"function_call": {"name": "look", "arguments": "{}"}},
        {"name": "Ada"},
        {"reasoning_content": "Hm, a cat?"},
        {"thinking": "Hm, a cat?"},
        {"refusal": "I cannot."},
        {"images": ["a.png"]},
        {"audio": {"id": "x"}},
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_a_message_says_and_nobody_follows_is_refused_by_name(context, shape, field):
    with pytest.raises(BadRecord, match=next(iter(field))) as refused:
        parse_row(SHAPED[shape](**field), context())
    assert refused.value.reason == "unfollowed-field"


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "look"}]},
        {"rejected": "no"},
        {"chosen": [{"role": "assistant", "content": "yes"}]},
        {"non_preferred_output": [{"role": "assistant", "content": "no"}]},
        {"audio": "a.wav"},
        {"history": [["a", "b"]]},
        {"sample_weight": 0},
        {"loss_weight": 0.3},
        {"system": "Be brief.", "system_prompt": "Be long."},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_a_row_says_and_nobody_follows_is_refused_by_name(context, shape, field):
    with pytest.raises(BadRecord, match=next(iter(field))) as refused:
        parse_row({**ROWS[shape], **field}, context())
    assert refused.value.reason == "unfollowed-field"


@pytest.mark.parametrize("shape", ROWS)
def test_notes_pass_and_empty_fields_say_nothing(context, shape):
    notes = {"id": 3, "source": "x", "split": "train", "score": 0.5, "model": "m", "parallel_tool_calls": True}
    empty = {"tools": [], "functions": None, "rejected": "", "history": [], "audio": None, "system": ""}
    assert parse_row({**ROWS[shape], **notes, **empty}, context()) == parse_row(ROWS[shape], context())


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_leads_them(context, told, shape, name):
    plain = told(parse_row(ROWS[shape], context()))
    led = told(parse_row({**ROWS[shape], name: "Be brief."}, context()))
    assert led == [("system", ["Be brief."]), *plain]


def test_a_system_prompt_that_is_there_twice_is_one_or_refused(context, told):
    turns = [{"role": "system", "content": "Be brief."}, *LATER]
    read = told(parse_row({"messages": turns, "system": "Be brief."}, context()))
    assert [role for role, _ in read] == ["system", "user", "assistant"]
    with pytest.raises(BadRecord, match="two system prompts"):
        parse_row({"messages": turns, "system": "Be long."}, context())


def test_a_chat_of_which_nothing_is_to_be_learned_is_refused(context):
    unlearned = [{**message, "train": False} for message in LATER]
    with pytest.raises(BadRecord, match="No assistant's turn is to be learned") as refused:
        parse_row({"messages": unlearned}, context())
    assert refused.value.reason == "empty-answer"
    with pytest.raises(BadRecord, match="only answers are learned"):
        parse_row({"messages": [{**LATER[0], "weight": 1}, LATER[1]]}, context())


@pytest.mark.parametrize("column", [{"video": "v.mp4"}, {"videos": ["v.mp4"]}])
def test_a_film_in_a_column_of_a_chat_is_not_lost(context, column):
    with pytest.raises(BadRecord, match="write it as a part of the content"):
        parse_row({**ROWS["chat"], **column}, context())


def test_pictures_in_two_columns_are_not_lost(context):
    with pytest.raises(BadRecord, match="image and images: say which"):
        parse_row({**ROWS["vqa"], "image": "a.png", "images": ["b.png"]}, context())
