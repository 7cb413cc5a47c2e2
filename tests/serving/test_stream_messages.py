"""Messages of a stream: read, or refused with a sentence that names what is wrong."""

import json

import pytest

from casa.errors import UserError
from casa.serving import Limits
from casa.serving.streams import read_hello, read_message, read_time, words
from casa.streaming import Sampling

LIMITS = Limits()


def hello(**values):
    return read_hello(read_message(json.dumps({"type": "hello", **values}), LIMITS), LIMITS, 2.0)


def test_a_hello_says_nothing_or_all():
    plain = hello(seed=0)
    assert (plain.fps, plain.token) == (2.0, "")
    assert plain.settings == {"max_text_tokens": 1024, "max_new_tokens": 32, "seed": 0, "sampling": Sampling()}
    # who draws without a seed hears something else each time
    assert len({hello().settings["seed"] for _ in range(8)}) == 8
    full = hello(
        prompt="what?",
        fps=5,
        max_text_tokens=200,
        max_new_tokens=9,
        seed=3,
        token="t",
        sampling={"temperature": 0.5, "top_k": 3, "no_repeat_ngram_size": 4, "presence_penalty": 1},
    )
    assert (full.fps, full.token) == (5, "t")
    assert full.settings == {
        "prompt": "what?",
        "max_text_tokens": 200,
        "max_new_tokens": 9,
        "seed": 3,
        "sampling": Sampling(temperature=0.5, top_k=3, no_repeat_ngram_size=4, presence_penalty=1.0),
    }


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": 1000}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"fps": True}, "fps"),
        ({"max_text_tokens": 10**6}, "max_text_tokens"),
        ({"max_text_tokens": 10.5}, "max_text_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**9}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"sampling": 3}, "sampling"),
        ({"sampling": {"heat": 1}}, "sampling"),
        ({"sampling": {"temperature": -1}}, "temperature"),
        ({"sampling": {"top_k": 0.5}}, "top_k"),
        ({"sampling": {"top_p": 0}}, "top_p"),
        ({"model": "x"}, "model"),
    ],
)
def test_wrong_hellos(values, word):
    with pytest.raises(UserError, match=word):
        hello(**values)


def test_infinity_is_no_number():
    with pytest.raises(UserError, match="fps"):
        read_hello(read_message('{"type": "hello", "fps": NaN}', LIMITS), LIMITS, 2.0)


@pytest.mark.parametrize(
    "text", ["", "hello", "[]", "3", "null", "{}", '{"type": "dance"}', '{"type": ["ask"]}', "[" * 10_000, "\x00"]
)
def test_what_is_no_message(text):
    with pytest.raises(UserError, match=r"JSON|type"):
        read_message(text, LIMITS)


def test_too_long_unknown_and_out_of_place():
    with pytest.raises(UserError, match="characters"):
        read_message(" " * (LIMITS.message_bytes + 1), LIMITS)
    with pytest.raises(UserError, match="'speed'"):
        read_message('{"type": "pause", "speed": 1}', LIMITS)
    with pytest.raises(UserError, match="hello"):
        read_hello({"type": "ask", "question": "?"}, LIMITS, 2.0)


def test_times_and_questions():
    assert read_time({"time": 2.5}) == 2.5
    for wrong in ({}, {"time": -1}, {"time": 1e12}, {"time": "1"}):
        with pytest.raises(UserError, match="time"):
            read_time(wrong)
    assert words({"question": "half a pair \ud83d"}, "question", LIMITS) == "half a pair ?"
    for wrong in ({}, {"question": " "}, {"question": ["a"]}):
        with pytest.raises(UserError, match="question"):
            words(wrong, "question", LIMITS)
