"""LLaVA's conversations, with pictures and with a video."""

import pytest

from casa.data import BadRecord, parse_row


def row(question="<image>\nWhat is it?", answer="A cat.", **rest):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **rest}


def test_a_picture_stands_at_its_tag(context, told):
    assert told(parse_row(row(image="a.png"), context())) == [
        ("user", ["a.png", "What is it?"]),
        ("assistant", ["A cat."]),
    ]


def test_several_pictures_over_several_turns(context, told):
    several = row("<image><image>\nWhich?", image=["a.png", "b.png", "c.png"])
    several["conversations"] += [{"from": "human", "value": "And\n<image>"}, {"from": "gpt", "value": "No."}]
    read = told(parse_row(several, context()))
    assert [parts for _, parts in read[::2]] == [["a.png", "b.png", "Which?"], ["And", "c.png"]]


def test_without_a_picture_it_is_text(context, told):
    assert told(parse_row(row("Why?"), context()))[0] == ("user", ["Why?"])


def test_keys_that_are_null_are_as_if_absent(context, told):
    turns = [
        {"from": None, "value": None, "role": "user", "content": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat.", "role": None, "content": None},
    ]
    read = told(parse_row({"image": "a.png", "images": None, "conversations": turns}, context()))
    assert read == told(parse_row(row(image="a.png"), context()))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("What is it?", image="a.png"), "picture-without-tag"),
        (row("<image>", image=["a.png", "b.png"]), "picture-without-tag"),
        (row("<image><image>?", image="a.png"), "tag-without-picture"),
        (row("<image>?"), "tag-without-picture"),
        (row(image="missing.png"), "missing-picture"),
        (row(image=""), "missing-picture"),
        (row(image="https://example.org/a.png"), "missing-picture"),
        (row(image=7), "wrong-type"),
        (row(answer="\n", image="a.png"), "empty-answer"),
        (row(answer=None, image="a.png"), "wrong-type"),
        ({"conversations": [7]}, "wrong-type"),
        ({"conversations": [{"from": None, "role": None, "value": "Hm?"}]}, "wrong-type"),
        ({"conversations": {"from": "human"}}, "wrong-type"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(context, bad, reason):
    with pytest.raises(BadRecord) as refused:
        parse_row(bad, context())
    assert refused.value.reason == reason


@pytest.mark.parametrize("tag", ["<image>", "<video>"])
def test_one_tag_stands_for_all_frames(context, told, root, tag):
    (root / "v.mp4").write_bytes(b"video")
    read = told(parse_row(row(f"{tag}\nWhat happens?", video="v.mp4"), context(fps=1.0)))
    assert read[0] == ("user", [0.0, 1.0, 2.0, "What happens?"])


def test_a_bad_conversation_is_refused_before_its_video_is_read(context, root):
    (root / "v.mp4").write_bytes(b"video")

    def unread(*_):
        raise AssertionError("the video was read")

    unreading = context()
    object.__setattr__(unreading, "frames_of", unread)
    with pytest.raises(BadRecord, match="0 places"):
        parse_row(row("What happens?", video="v.mp4"), unreading)
