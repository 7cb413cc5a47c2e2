"""Questions and answers in columns, and prompts with their completions."""

import pytest

from casa.data import BadRecord, parse_row


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"question": "What?", "answer": "A cat."}, ["A cat."]),
        ({"question": "What?", "answers": ["A cat.", "cat", "A cat.", " "]}, ["A cat.", "cat", "A cat."]),
        ({"query": "What?", "label": ["A cat."], "human_or_machine": 0}, ["A cat."]),
        ({"query": "What?", "labels": ["A cat.", "cat"]}, ["A cat.", "cat"]),
        ({"query": "What?", "response": "A cat.", "history": None}, ["A cat."]),
        ({"question": "What?", "answer": "A cat.", "answers": ["cat", "A cat."]}, ["cat", "A cat."]),
        ({"question": "What?", "answer": "A cat.", "answers": ["cat", "cat"]}, ["A cat.", "cat", "cat"]),
        (
            {
                "question": "What?",
                "multiple_choice_answer": "A cat.",
                "answers": [{"answer": "cat", "answer_id": 1}, {"answer": "A cat.", "answer_id": 2}],
            },
            ["cat", "A cat."],
        ),
        ({"question": "What?", "answers": {"text": ["A cat."], "answer_start": [0]}}, ["A cat."]),
    ],
)
def test_the_first_answer_is_learned_and_all_are_kept(context, told, row, references):
    record = parse_row({**row, "image": "a.png", "question_id": 7}, context())
    assert told(record) == [("user", ["a.png", "What?"]), ("assistant", ["A cat."])]
    assert list(record.references) == references
    assert parse_row({**row, "image": "a.png"}, context(shape="vqa")) == record


def test_pictures_stand_before_the_question_or_at_tags_or_not_at_all(context, told):
    row = {"question": "Compare <image> and <image>.", "answer": "Both are red.", "images": ["a.png", "b.png"]}
    assert told(parse_row(row, context()))[0] == ("user", ["Compare ", "a.png", " and ", "b.png", "."])
    row = {"question": "Which?", "answer": "Both.", "images": ["a.png", "b.png"]}
    assert told(parse_row(row, context()))[0] == ("user", ["a.png", "b.png", "Which?"])
    assert told(parse_row({"question": "Why?", "answer": "So."}, context()))[0] == ("user", ["Why?"])


@pytest.mark.parametrize(
    ("row", "reason", "remedy"),
    [
        ({"question": "What?", "answers": []}, "empty-answer", "leave the record out"),
        ({"question": "What?", "answer": " "}, "empty-answer", "leave the record out"),
        ({"question": " ", "answer": "A cat."}, "empty-question", "leave the record out"),
        ({"question": "What?", "answer": 3}, "wrong-type", "not text"),
        ({"question": "What?", "query": "Hm?", "answer": "A cat."}, "unknown-shape", "columns: {question: question}"),
        ({"question": "What?", "answer": "x", "label": "y"}, "unknown-shape", "answer and label: say which"),
        ({"question": "What?", "answer": "B", "choices": ["x", "y"]}, "unfollowed-field", "write it into the question"),
        ({"question": "What?", "answer": "B", "context": "Once."}, "unfollowed-field", "write it into the question"),
        ({"query": "And?", "response": "x", "history": [["What?", "y"]]}, "unfollowed-field", "write all of them"),
        ({"question": "What?", "answer": "x", "image": "a.png", "caption": "y"}, "unknown-shape", "vqa or caption"),
        ({"question": "<image>?", "answer": "x"}, "tag-without-picture", "give the missing ones"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(context, row, reason, remedy):
    with pytest.raises(BadRecord, match=remedy) as refused:
        parse_row(row, context())
    assert refused.value.reason == reason


ASKED = [{"role": "user", "content": "What?"}]
SAID = [{"role": "assistant", "content": "A cat."}]


def test_a_prompt_and_its_completion_as_texts_and_as_chats(context, told):
    texts = {"prompt": "What?", "completion": "A cat.", "images": ["a.png"]}
    wanted = [("user", ["a.png", "What?"]), ("assistant", ["A cat."])]
    assert told(parse_row(texts, context())) == wanted
    assert told(parse_row({"prompt": ASKED, "completion": SAID, "image": "a.png"}, context())) == wanted
    parted = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    read = told(parse_row({"prompt": parted, "completion": SAID, "images": ["a.png"]}, context()))
    assert read[0] == ("user", ["What?", "a.png"])
    brief = [{"role": "system", "content": "Be brief."}, *ASKED]
    read = told(parse_row({"prompt": brief, "completion": "A cat.", "images": ["a.png"]}, context()))
    assert read == [("system", ["Be brief."]), *wanted]


def test_the_completion_alone_is_learned(context):
    earlier = [*ASKED, *SAID, {"role": "user", "content": "And?"}]
    record = parse_row({"prompt": earlier, "completion": [{"role": "assistant", "content": "A dog."}]}, context())
    assert [message.learn for message in record.messages if message.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What?", "completion": ""}, "empty-answer"),
        ({"prompt": "What?", "completion": ASKED}, "empty-answer"),
        ({"prompt": "What?", "completion": "Hm.", "label": False}, "unfollowed-field"),
        ({"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}, "unfollowed-field"),
        ({"prompt": "<image>?", "completion": "A cat."}, "tag-without-picture"),
        ({"prompt": 3, "completion": "A cat."}, "wrong-type"),
        ({"prompt": "What?", "completion": "A cat.", "messages": ASKED}, "unknown-shape"),
    ],
)
def test_what_is_no_pair_is_refused(context, row, reason):
    with pytest.raises(BadRecord) as refused:
        parse_row(row, context())
    assert refused.value.reason == reason
