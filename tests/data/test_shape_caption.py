"""A picture and its caption."""

import pytest

from casa.data import BadRecord, parse_row


@pytest.mark.parametrize("row", [{"image": "a.png", "caption": "A cat."}, {"file_name": "a.png", "text": "A cat."}])
def test_the_user_asks_and_the_caption_answers(context, told, row):
    assert told(parse_row(row, context())) == [("user", ["a.png", "Describe the picture."]), ("assistant", ["A cat."])]


def test_names_of_columns_and_prompt_are_settings(context, told):
    settings = context(columns={"image": "foto", "caption": "titel"}, prompt="Was ist das?")
    read = told(parse_row({"foto": "a.png", "titel": "Eine Katze.", "id": 3}, settings))
    assert read == [("user", ["a.png", "Was ist das?"]), ("assistant", ["Eine Katze."])]


@pytest.mark.parametrize(
    ("row", "reason", "remedy"),
    [
        ({"image": "a.png", "caption": " "}, "empty-answer", "leave the record out"),
        ({"image": "", "caption": "A cat."}, "missing-picture", "give the path"),
        ({"image": "a.png", "caption": "A cat.", "text": "A dog."}, "unknown-shape", "columns: {caption: caption}"),
        ({"image": "a.png", "image_path": "b.png", "caption": "A cat."}, "unknown-shape", "columns: {image: image}"),
        ({"image": "a.png", "caption": 3}, "wrong-type", "not text"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(context, row, reason, remedy):
    with pytest.raises(BadRecord) as refused:
        parse_row(row, context())
    assert refused.value.reason == reason
    assert remedy in str(refused.value)
