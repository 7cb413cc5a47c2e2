"""Telling shapes apart by their keys, and naming what cannot be told apart."""

import pytest

from casa.data import BadRecord, parse_row
from casa.data.shapes import SHAPES, recognised

STREAM = [{"role": "assistant", "content": [{"type": "text_stream", "text_stream": []}]}]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": [], "images": []}, "chat"),
        ({"messages": STREAM}, "live-whisperx"),
        ({"video": "v.mp4", "words": []}, "live-whisperx"),
        ({"conversations": [], "image": "a.png", "id": 1}, "llava"),
        ({"conversations": [], "image": None, "video": "v.mp4"}, "llava-video"),
        ({"conversations": []}, "llava"),
        ({"texts": [], "images": [], "source": "x"}, "finevision"),
        ({"image": "a.png", "caption": "x"}, "caption"),
        ({"messages": [], "image": "a.png", "text": "kept from before"}, "chat"),
        ({"messages": [], "prompt": "x", "prompt_id": "y"}, "chat"),
        ({"question": "x", "answers": ["y"], "image": None}, "vqa"),
        ({"query": "x", "label": ["y"], "image": "a.png"}, "vqa"),
        ({"prompt": [], "completion": []}, "prompt-completion"),
    ],
)
def test_keys_tell_the_shape(row, shape):
    assert recognised(row) == shape
    assert shape in SHAPES


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [], "conversations": []}, "could be chat or llava: name the shape"),
        ({"conversations": [], "image": "a", "video": "b"}, "could be llava-video or llava: name the shape"),
        ({"question": "x", "reply": "y"}, r"keys \(question, reply\) fit no shape"),
        ({}, r"keys \(none\)"),
        ({"image": "a.png"}, "fit no shape"),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_remedy(context, row, sentence):
    with pytest.raises(BadRecord, match=sentence) as refused:
        parse_row(row, context())
    assert refused.value.reason == "unknown-shape"


def test_a_named_shape_is_not_questioned(context, told):
    row = {"messages": [], "conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]}
    assert told(parse_row(row, context(shape="llava"))) == [("user", ["Hm?"]), ("assistant", ["Yes."])]


@pytest.mark.parametrize("row", [3, "text", None, True, 1.5])
@pytest.mark.parametrize("shape", ["auto", *SHAPES])
def test_a_row_that_is_no_object_is_bad(context, row, shape):
    with pytest.raises(BadRecord, match="not an object"):
        parse_row(row, context(shape=shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_another_shape_is_bad_and_nothing_else(context, shape):
    for row in ({}, {"messages": 3, "conversations": 3, "texts": 3, "image": 3, "video": 3, "words": 3}):
        with pytest.raises(BadRecord):
            parse_row(row, context(shape=shape))


def test_a_column_that_is_not_there_is_named(context):
    with pytest.raises(BadRecord, match="no column 'foto'"):
        parse_row({"image": "a.png", "caption": "x"}, context(columns={"image": "foto"}))
