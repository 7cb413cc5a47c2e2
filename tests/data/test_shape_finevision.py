"""FineVision's rows."""

import pytest

from casa.data import BadRecord, parse_row


def row(*texts, images=("a.png", "b.png")):
    return {"images": list(images), "texts": [{"user": user, "assistant": said} for user, said in texts]}


def test_pictures_stand_before_the_first_question(context, told):
    read = told(parse_row(row(("What?", "A cat."), ("Where?", "Here.")), context()))
    assert [parts for _, parts in read] == [["a.png", "b.png", "What?"], ["A cat."], ["Where?"], ["Here."]]


def test_pictures_stand_at_tags_where_there_are_any(context, told):
    read = told(parse_row(row(("<image>What?", "A cat."), ("<image>Where?", "Here.")), context()))
    assert [parts for _, parts in read[::2]] == [["a.png", "What?"], ["b.png", "Where?"]]


def test_pictures_as_datasets_keeps_them(context, told):
    read = told(parse_row(row(("What?", "A cat."), images=[{"bytes": b"png", "path": "x.png"}]), context()))
    assert read[0] == ("user", ["bytes", "What?"])


@pytest.mark.parametrize("images", [None, []])
def test_without_pictures_it_is_text(context, told, images):
    assert told(parse_row({**row(("Why?", "So.")), "images": images}, context()))[0] == ("user", ["Why?"])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(("<image>What?", "A cat.")), "picture-without-tag"),
        (row(("What?", "")), "empty-answer"),
        (row(), "empty-answer"),
        (row(("What?", None)), "wrong-type"),
        ({"images": [], "texts": ["What?"]}, "wrong-type"),
        ({"images": [], "texts": "What?"}, "wrong-type"),
        (row(("What?", "A cat."), images=[None]), "missing-picture"),
        (row(("What?", "A cat."), images=[{"bytes": None, "path": None}]), "missing-picture"),
        (row(("What?", "A cat."), images=[b""]), "unreadable-picture"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(context, bad, reason):
    with pytest.raises(BadRecord) as refused:
        parse_row(bad, context())
    assert refused.value.reason == reason
