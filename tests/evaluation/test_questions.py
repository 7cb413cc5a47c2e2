"""Questions of every shape of record, in the order of the data."""

import json

import numpy as np
import pytest
from PIL import Image

from casa.data import SourceSettings
from casa.data.frames import video_frames
from casa.errors import UserError
from casa.evaluation.questions import AdaptedRow, AnswerSettings, BadQuestion, read_questions
from casa.media import VideoWriter
from casa.settings import build

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "A dog.", "train": False},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (28, 28), "red").save(tmp_path / f"{name}.png")
    with VideoWriter(tmp_path / "clip.mp4", (56, 56), fps=4) as film:
        for level in range(8):
            film.write(np.full((56, 56, 3), 30 * level, dtype=np.uint8))
    return tmp_path


def read(folder, *rows, **settings):
    (folder / "qa.jsonl").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return list(read_questions([SourceSettings(str(folder / "qa.jsonl"))], **settings))


def turns(asked, said):
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def test_every_shape_asks(folder):
    rows = [
        {"image": "a.png", "question": "What?", "answers": ["cat", "cat", "a cat"]},
        {"images": ["a.png", "b.png"], "question": "Which?", "answer": "both"},
        {"image": "a.png", "caption": "A cat."},
        {"image": "a.png", "conversations": turns("<image>\nHm?", "Yes.")},
        {"images": ["a.png"], "texts": [{"user": "One?", "assistant": "1"}, {"user": "Two?", "assistant": "2"}]},
        {"images": ["a.png"], "prompt": "Well?", "completion": "So."},
        {"video": "clip.mp4", "conversations": turns("<video>\nNow?", "No.")},
        {"video": "clip.mp4", "title": "Look.", "words": [[0.1, 0.2, "Light"], [1.2, 1.4, "comes."]]},
    ]
    found = read(folder, *rows)
    told = [(one.record.rpartition(":")[2], one.turn, one.text, one.references, len(one.pictures)) for one in found]
    assert told == [
        ("1", 1, "What?", ("cat", "cat", "a cat"), 1),
        ("2", 1, "Which?", ("both",), 2),
        ("3", 1, "Describe the picture.", ("A cat.",), 1),
        ("4", 1, "Hm?", ("Yes.",), 1),
        ("5", 1, "One?", ("1",), 1),
        ("5", 2, "Two?", ("2",), 1),
        ("6", 1, "Well?", ("So.",), 1),
        ("7", 1, "Now?", ("No.",), 4),
        ("8", 1, "Look.", ("Light comes.",), 3),
    ]
    assert [one.index for one in found] == list(range(9))
    assert [one.is_live for one in found] == [False] * 8 + [True]


def test_a_later_turn_is_asked_with_the_true_answers_before_it(folder):
    first, later = read(folder, {"messages": CHAT}, suffix="One word.")
    assert [message.text for message in first.messages] == ["Be brief.", "What?\nOne word."]
    said = ["Be brief.", "What?", "A cat.", "And?", "A dog.", "Sure?\nOne word."]
    assert [message.text for message in later.messages] == said
    assert (first.turn, later.turn, later.references) == (1, 2, ("Yes.",))
    assert first.keys == later.keys


def test_bad_rows_stand_where_they_are(folder):
    good = {"question": "What?", "answer": "x"}
    found = read(folder, good, "{", {"image": "gone.png", **good}, good)
    assert [isinstance(one, BadQuestion) for one in found] == [False, True, True, False]
    assert [one.bad.reason for one in found[1:3]] == ["not-json", "missing-picture"]
    assert found[1].record.endswith("qa.jsonl:2")
    assert [one.index for one in (found[0], found[3])] == [0, 1]
    assert len(read(folder, good, "{", good, limit=2)) == 2


def test_rows_of_another_form_are_made_known_ones(folder):
    def adapt(row, task):
        return AdaptedRow([{"type": "image", "image": "a.png"}], f"{row['ask']} <image>", (row["say"], "or so"))

    found = read(
        folder, {"ask": "What?", "say": "x", "kind": 3}, {"ask": "Hm?"}, [1], adapt=adapt, known=("kind", "task")
    )
    assert (found[0].text, found[0].references) == ("What? <image>", ("x", "or so"))
    assert found[0].row == {"kind": 3, "task": "qa"}
    assert str(found[1].bad).startswith("The row has no field 'say'")
    assert "it is no object with fields" in str(found[2].bad)


def test_a_film_is_decoded_once_for_its_questions(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "casa.evaluation.questions.video_frames", lambda *given: decoded.append(given) or video_frames(*given)
    )
    asked = [
        {"video": "clip.mp4", "conversations": turns(f"<video>\n{word}?", "No.")} for word in ("Now", "Then", "Ever")
    ]
    found = read(folder, *asked)
    assert len({one.keys for one in found}) == len(decoded) == 1
    assert len(found) == 3


def test_the_same_bytes_are_the_same_picture(folder):
    data = "data:image/png;base64," + __import__("base64").b64encode((folder / "a.png").read_bytes()).decode()
    one, other, third = read(folder, *[{"image": data, "question": q, "answer": "x"} for q in "ab"],
                             {"image": "a.png", "question": "c", "answer": "x"})  # fmt: skip
    assert one.keys == other.keys != third.keys


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"sufix": "x"}, "did you mean 'suffix'"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        build(AnswerSettings, values)
