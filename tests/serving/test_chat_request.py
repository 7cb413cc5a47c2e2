"""OpenAI's chat request: what is understood, and what is refused by name."""

import json

import pytest

from casa.serving import Limits
from casa.serving.chat_request import RequestError, parse_body, read_chat
from casa.streaming import Sampling

LIMITS = Limits()


def chat(**changes):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | changes
    return read_chat(body, "tiny", LIMITS, False)


def test_the_least_and_the_most():
    least = chat()
    assert least.messages == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert (least.max_tokens, least.sampling, least.stop, least.stream) == (1024, Sampling(), (), False)
    most = chat(
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0,
        seed=4,
        stop="x",
        n=1,
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        logprobs=False,
        tools=[],
    )
    assert (most.max_tokens, most.seed, most.stop, most.stream, most.include_usage) == (7, 4, ("x",), True, True)
    assert most.sampling == Sampling(temperature=0.5, top_p=1e-6)
    assert chat(max_tokens=10**6).max_tokens == 1024


def test_pictures_are_opened(data_urls):
    parts = [
        {"type": "image_url", "image_url": {"url": data_urls[0], "detail": "low"}},
        {"type": "text", "text": "what?"},
    ]
    found = chat(messages=[{"role": "user", "content": parts}])
    assert found.pictures == 1
    assert found.messages[0]["content"][0]["image"].size == (84, 56)


@pytest.mark.parametrize(
    ("changes", "param", "status"),
    [
        ({"model": "gpt"}, "model", 404),
        ({"model": None}, "model", 404),
        ({"messages": []}, "messages", 400),
        ({"messages": "hi"}, "messages", 400),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages", 400),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0", 400),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages.0", 400),
        ({"seed": 10**400}, "seed", 400),
        ({"temperature": 10**400}, "temperature", 400),
        ({"max_tokens": float("nan")}, "max_tokens", 400),
        ({"temperature": float("inf")}, "temperature", 400),
        ({"\ud800": 1}, "?", 400),
        ({"messages": [{"role": "user"}]}, "messages.0.content", 400),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content", 400),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content", 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", 400),
        ({"messages": [{"role": "user", "content": "a" * 70_000}]}, "messages.0", 400),
        ({"temperature": 3}, "temperature", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"top_p": -1}, "top_p", 400),
        ({"seed": 1.5}, "seed", 400),
        ({"max_tokens": -1}, "max_tokens", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_completion_tokens": 0, "max_tokens": 5}, "max_completion_tokens", 400),
        ({"n": 0}, "n", 400),
        ({"messages": [{"role": "user", "content": ""}] * 8193}, "messages", 400),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 65_537}]}, "messages.0", 400),
        ({"stop": ["a"] * 5}, "stop", 400),
        ({"stop": 3}, "stop", 400),
        ({"n": 2}, "n", 400),
        ({"stream": "yes"}, "stream", 400),
        ({"tools": [{"type": "function"}]}, "tools", 400),
        ({"logprobs": True}, "logprobs", 400),
        ({"response_format": {"type": "json_object"}}, "response_format", 400),
    ],
)
def test_what_is_refused(changes, param, status):
    with pytest.raises(RequestError) as caught:
        chat(**changes)
    assert (caught.value.param, caught.value.status) == (param, status)


def test_too_many_pictures(data_urls):
    part = {"type": "image_url", "image_url": {"url": data_urls[0]}}
    with pytest.raises(RequestError, match="pictures"):
        chat(messages=[{"role": "user", "content": [part] * 17}])
    with pytest.raises(RequestError, match="data: addresses"):
        chat(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.org/b.png"}}]}]
        )


def test_many_empty_messages_are_not_even_looked_at():
    """Each would be nothing, and all together more than a tokenizer takes."""

    class Unread(list):
        def __iter__(self):
            raise AssertionError("read")

    few = Limits(prompt_tokens=3)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}] * 3}
    assert len(read_chat(body, "tiny", few, False).messages) == 3
    with pytest.raises(RequestError, match="too long") as caught:
        read_chat(body | {"messages": Unread(body["messages"] + body["messages"])}, "tiny", few, False)
    assert caught.value.code == "context_length_exceeded"


def test_json_of_more_values_than_any_chat_has_is_not_read(monkeypatch):
    few = Limits(prompt_tokens=3)
    letters = [{"role": "user", "content": [{"type": "text", "text": ","}]}] * 24
    longest = json.dumps({"model": "tiny", "messages": letters}).encode()
    assert len(parse_body(longest, few)["messages"]) == 24
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("read"))
    for empty in (b"[]", b"{}", b"0"):
        with pytest.raises(RequestError, match="too long"):
            parse_body(b"[" + b",".join([empty] * 200) + b"]", few)


def test_a_body_of_something_else():
    with pytest.raises(RequestError, match="object"):
        read_chat([1], "tiny", LIMITS, False)


def test_halves_of_characters_become_question_marks():
    found = chat(messages=[{"role": "user", "content": "a\ud800b"}])
    assert found.messages[0]["content"][0]["text"] == "a?b"
