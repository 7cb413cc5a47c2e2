"""Chat messages: every way in which content and pictures are written, and what is refused."""

import base64

import pytest

from casa.data import BadRecord, parse_row

ANSWER = {"role": "assistant", "content": "A cat."}
URI = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()


def test_content_as_a_string(context, told):
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?"}, ANSWER]}
    assert told(parse_row(row, context())) == [("system", ["Be brief."]), ("user", ["Hm?"]), ("assistant", ["A cat."])]


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, "bytes"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "input_image", "image_url": "a.png"}, "a.png"),
        ({"type": "image", "image": "a.png", "text": None}, "a.png"),
        ({"type": "image", "url": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "image": {"bytes": b"png", "path": None}}, "bytes"),
    ],
)
def test_a_picture_in_its_part(context, told, part, shown):
    row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, ANSWER]}
    assert told(parse_row(row, context()))[0] == ("user", [shown, "What?"])


def test_places_are_filled_from_the_column_in_order(context, told):
    first = [{"type": "image"}, {"type": "text", "text": "One"}, {"type": "text", "text": " two"}, {"type": "image"}]
    turns = [{"role": "user", "content": first}, ANSWER, {"role": "user", "content": [{"type": "image"}]}, ANSWER]
    read = told(parse_row({"messages": turns, "images": ["a.png", "b.png", "c.png"]}, context()))
    assert [parts for role, parts in read if role == "user"] == [["a.png", "One two", "b.png"], ["c.png"]]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("See <image>\nand <image> there.", ["See ", "a.png", "and ", "b.png", " there."]),
        ("Compare <image> and <image>.", ["Compare ", "a.png", " and ", "b.png", "."]),
        ("<image>\n<image>\nWhich?", ["a.png", "b.png", "Which?"]),
        ("<image> <image> \r\n Which?", ["a.png", "b.png", "Which?"]),
        ("Which? \n\n <image>\n \n<image>", ["Which?", "a.png", "b.png"]),
        ("<image> or <image>", ["a.png", " or ", "b.png"]),
    ],
)
def test_tags_in_strings_are_places(context, told, content, parts):
    """Line ends beside a tag are the tag's, blanks within a line are the text's."""
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png", "b.png"]}
    assert told(parse_row(row, context()))[0] == ("user", parts)


def test_blank_parts_stay_where_they_are(context, told):
    content = [{"type": "image"}, {"type": "text", "text": " "}, {"type": "image"}, {"type": "text", "text": "\nHm?"}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png", "b.png"]}
    assert told(parse_row(row, context()))[0] == ("user", ["a.png", " ", "b.png", "\nHm?"])


def test_beside_image_parts_a_tag_is_text(context, told):
    content = [{"type": "image"}, {"type": "text", "text": "What does <image> mean in HTML?"}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png"]}
    assert told(parse_row(row, context()))[0] == ("user", ["a.png", "What does <image> mean in HTML?"])


def test_a_video_part_is_its_frames(context, told, root):
    (root / "v.mp4").write_bytes(b"video")
    part = {"type": "video", "video": "v.mp4", "video_start": 1, "video_end": 2.5}
    row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, ANSWER]}
    assert told(parse_row(row, context()))[0] == ("user", [1.0, 1.5, 2.0, "What?"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "Hm <image>?"}, ANSWER]}, "tag-without-picture"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "tag-without-picture"),
        ({"messages": [{"role": "user", "content": "Hm?"}, ANSWER], "images": ["a.png"]}, "picture-without-tag"),
        ({"messages": [{"role": "user", "content": "Hm?"}, {**ANSWER, "content": " "}]}, "empty-answer"),
        ({"messages": [{"role": "user", "content": "Hm?"}, {**ANSWER, "content": []}]}, "empty-answer"),
        ({"messages": [{"role": "user", "content": "Hm?"}]}, "empty-answer"),
        ({"messages": []}, "empty-answer"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "empty-question"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "wrong-type"),
        ({"messages": [{"role": "user", "content": {"text": "Hm?"}}, ANSWER]}, "wrong-type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "wrong-type"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER]}, "wrong-type"),
        ({"messages": [{"role": "tool", "content": "Hm?"}, ANSWER]}, "wrong-type"),
        ({"messages": [{"content": "Hm?"}, ANSWER]}, "wrong-type"),
        ({"messages": [{"role": None, "from": None, "content": "Hm?"}, ANSWER]}, "wrong-type"),
        ({"messages": ["Hm?", ANSWER]}, "wrong-type"),
        ({"messages": "Hm?"}, "wrong-type"),
        ({"messages": [ANSWER, {"role": "system", "content": "Be brief."}]}, "wrong-type"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}, ANSWER]}, "broken-text"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(context, row, reason):
    with pytest.raises(BadRecord) as refused:
        parse_row(row, context())
    assert refused.value.reason == reason


def test_a_chat_by_from_and_value(context, told):
    row = {"messages": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes 🚀 שלום."}]}
    assert told(parse_row(row, context())) == [("user", ["Hm?"]), ("assistant", ["Yes 🚀 שלום."])]


def test_keys_that_are_null_are_as_if_absent(context, told):
    asked = {"role": None, "content": None, "from": "human", "value": "Hm?"}
    row = {"messages": [asked, {**ANSWER, "from": None, "value": None}]}
    assert told(parse_row(row, context())) == [("user", ["Hm?"]), ("assistant", ["A cat."])]
