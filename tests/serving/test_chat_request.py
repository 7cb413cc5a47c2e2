"""OpenAI's chat request: what is understood, and what is refused by name."""

import base64
import json
from dataclasses import replace
from typing import get_args, get_type_hints
from urllib.parse import quote

import pytest
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessage,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
    completion_create_params,
)
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from PIL import Image

from casa.serving import Limits
from casa.serving.chat import DETAILS, RequestError, parse_body, read_chat
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
        max_tokens=9,
        temperature=0.5,
        top_p=0,
        top_k=3,
        presence_penalty=0.5,
        frequency_penalty=-1,
        seed=4,
        stop="x",
        n=3,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": True},
    )
    assert (most.max_tokens, most.seed, most.stop, most.stream, most.include_usage) == (7, 4, ("x",), True, True)
    assert (most.choices, most.top_logprobs, most.obfuscate) == (3, 2, True)
    assert most.sampling == Sampling(temperature=0.5, top_p=1e-6, top_k=3, presence_penalty=0.5, frequency_penalty=-1)
    assert chat(max_tokens=10**6).max_tokens == 1024
    assert chat(max_tokens=5, max_completion_tokens=8).max_tokens == 5
    assert chat(top_k=-1).sampling.top_k == 0


def test_without_a_seed_every_request_has_its_own():
    assert len({chat(temperature=1).seed for _ in range(8)}) == 8
    assert chat(seed=0).seed == 0


# Of every field of OpenAI's own request: values that ask for nothing, and values that this server cannot give.
# None: obeyed, as the tests above and those of the answers show.
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
OBEYED = None
FIELDS = {
    **dict.fromkeys(("messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p"), OBEYED),
    **dict.fromkeys(("seed", "stop", "n", "stream", "presence_penalty", "frequency_penalty"), OBEYED),
    **dict.fromkeys(("logprobs", "top_logprobs", "stream_options"), OBEYED),
    "audio": ([], [{"voice": "alloy", "format": "mp3"}]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logit_bias": ([{}], [{"50256": -100}]),
    "metadata": ([{}, {"run": "7"}], []),
    "modalities": ([["text"]], [["text", "audio"], ["audio"]]),
    "moderation": ([], [{"model": "omni"}]),
    "parallel_tool_calls": ([True, False], ["yes"]),
    "prediction": ([], [{"type": "content", "content": "a"}]),
    "prompt_cache_key": (["mine"], []),
    "prompt_cache_options": ([{"mode": "implicit"}], []),
    "prompt_cache_retention": (["24h"], []),
    "reasoning_effort": (["none", "medium"], ["low", "high"]),
    "response_format": (
        [{"type": "text"}],
        [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, {}, "text"],
    ),
    "safety_identifier": (["me"], []),
    "service_tier": (["auto", "default"], ["flex", "priority"]),
    "store": ([False], [True, 0]),
    "tool_choice": (["none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "tools": ([[]], [TOOLS]),
    "user": (["me", ""], []),
    "verbosity": (["medium"], ["low", "high"]),
    "web_search_options": ([], [{}, {"search_context_size": "low"}]),
}


def test_the_table_has_every_field_of_openais_own_request():
    assert set(FIELDS) == get_type_hints(completion_create_params.CompletionCreateParamsNonStreaming).keys()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_obeyed_or_asks_for_nothing_or_is_refused_by_name(field):
    if field not in ("messages", "model"):
        # null is OpenAI's way to say nothing
        assert replace(chat(**{field: None}), seed=1) == chat(seed=1)
    if FIELDS[field] is OBEYED:
        return
    nothing, refused = FIELDS[field]
    for value in nothing:
        assert chat(**{field: value}, seed=1) == chat(seed=1)
    for value in refused:
        with pytest.raises(RequestError, match=f"^{field} is not supported") as caught:
            chat(**{field: value})
        assert (caught.value.param, caught.value.status) == (field, 400)


def test_a_field_nobody_knows_may_say_nothing():
    for nothing in (None, False, 0, [], {}, ""):
        assert chat(made_up=nothing, seed=1) == chat(seed=1)
    with pytest.raises(RequestError, match="made_up is not supported"):
        chat(made_up="x")


SAID = {"role": "assistant", "content": "yes"}
# Of every field of OpenAI's own messages besides role and content, and of those of a part: as above.
MESSAGES = {
    "user": ({"name": ([None, ""], ["alice"])}, ChatCompletionUserMessageParam),
    "system": ({"name": ([None], ["rules"])}, ChatCompletionSystemMessageParam),
    "developer": ({"name": ([None], ["rules"])}, ChatCompletionDeveloperMessageParam),
    "assistant": (
        {
            "name": ([None], ["bob"]),
            "tool_calls": ([None, []], [CALLS]),
            "function_call": ([None], [{"name": "f", "arguments": "{}"}]),
            "audio": ([None], [{"id": "a"}]),
            "refusal": ([None, ""], ["I will not"]),
        },
        ChatCompletionAssistantMessageParam,
    ),
}


@pytest.mark.parametrize("role", MESSAGES)
def test_every_field_of_a_message_is_read_or_refused_by_name(role):
    fields, kind = MESSAGES[role]
    assert set(fields) == get_type_hints(kind).keys() - {"role", "content"}
    asked = {"role": "user", "content": "hi"}
    plain = chat(messages=[{"role": role, "content": "yes"}, asked], seed=1)
    for field, (nothing, refused) in [*fields.items(), ("made_up", ([None, [], False], ["x"]))]:
        for value in nothing:
            assert chat(messages=[{"role": role, "content": "yes", field: value}, asked], seed=1) == plain
        for value in refused:
            with pytest.raises(RequestError, match=field) as caught:
                chat(messages=[{"role": role, "content": "yes", field: value}, asked])
            assert caught.value.param == f"messages.0.{field}"


def test_what_an_assistant_said():
    """Nothing at all, with or without parts, or that it would not answer."""

    def said(**message):
        found = chat(
            messages=[{"role": "user", "content": "hi"}, {"role": "assistant", **message}, SAID | {"role": "user"}]
        )
        return [part["text"] for part in found.messages[1]["content"]]

    assert said(content=None) == said(content="") == said(content=None, tool_calls=None) == said() == [""]
    assert said(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == ["a", "b"]
    assert said(content=None, refusal="no") == said(content=[{"type": "refusal", "refusal": "no"}]) == ["no"]
    # what this server answered, sent back as it came
    answer = ChatCompletionMessage(role="assistant", content="yes", refusal=None)
    assert said(**{key: value for key, value in answer.model_dump().items() if key != "role"}) == ["yes"]
    with pytest.raises(RequestError, match="content"):
        chat(messages=[{"role": "user", "content": None}])


def test_every_part_of_openais_own_is_read_or_refused_by_its_type(data_urls):
    def asked(part, role="user"):
        return chat(messages=[{"role": role, "content": [part]}, {"role": "user", "content": "hi"}], seed=1)

    read = {
        "text": {"type": "text", "text": "a"},
        "image_url": {"type": "image_url", "image_url": {"url": data_urls[0]}},
    }
    kinds = {get_args(get_type_hints(kind)["type"])[0] for kind in get_args(ChatCompletionContentPartParam)}
    assert kinds > set(read)
    for kind in kinds - set(read):
        with pytest.raises(RequestError, match="of type text, image_url, video_url") as caught:
            asked({"type": kind, kind: {}})
        assert caught.value.param == "messages.0.content"
    for kind, part in read.items():
        known = get_type_hints(
            dict(zip(read, (ChatCompletionContentPartTextParam, ChatCompletionContentPartImageParam), strict=True))[
                kind
            ]
        )
        assert set(known) == {"type", kind, "prompt_cache_breakpoint"}
        assert asked(part | {"prompt_cache_breakpoint": {"mode": "explicit"}}) == asked(part)
        with pytest.raises(RequestError, match="made_up") as caught:
            asked(part | {"made_up": 1})
        assert caught.value.param == "messages.0.content.made_up"
    for role in ("system", "developer", "assistant"):
        assert asked(read["text"], role).messages[0]["content"] == [read["text"]]


def test_the_detail_of_a_picture(encode):
    picture = Image.new("RGB", (900, 600))
    address = "data:image/png;base64," + base64.b64encode(encode(picture)).decode()

    def size(**more):
        part = {"type": "image_url", "image_url": {"url": address, **more}}
        return chat(messages=[{"role": "user", "content": [part]}]).messages[0]["content"][0]["image"].size

    assert set(get_args(get_type_hints(ImageURL)["detail"])) == set(DETAILS)
    assert (
        size()
        == size(detail=None)
        == size(detail="auto")
        == size(detail="high")
        == size(detail="original")
        == (900, 600)
    )
    assert size(detail="low") == (512, 341)
    for wrong in ("medium", 3, ["low"]):
        with pytest.raises(RequestError, match="detail") as caught:
            size(detail=wrong)
        assert caught.value.param == "messages.0.content.image_url.detail"
    with pytest.raises(RequestError, match="made_up"):
        size(made_up=1)


def test_base64_as_programs_wrap_it(encode):
    wrapped = base64.encodebytes(encode(Image.effect_noise((60, 40), 50))).decode()
    assert wrapped.count("\n") > 3
    for written in (wrapped, wrapped.replace("\n", "\r\n"), f" {wrapped} ", quote(wrapped)):
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + written}}
        assert chat(messages=[{"role": "user", "content": [part]}]).messages[0]["content"][0]["image"].size == (60, 40)


def test_pictures_are_opened(data_urls):
    parts = [
        {"type": "image_url", "image_url": {"url": data_urls[0], "detail": "low"}},
        {"type": "text", "text": "what?"},
    ]
    found = chat(messages=[{"role": "user", "content": parts}])
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
        ({"n": 9}, "n", 400),
        ({"n": 1.5}, "n", 400),
        ({"presence_penalty": 3}, "presence_penalty", 400),
        ({"frequency_penalty": -2.5}, "frequency_penalty", 400),
        ({"top_k": -2}, "top_k", 400),
        ({"top_k": 1.5}, "top_k", 400),
        ({"logprobs": 1}, "logprobs", 400),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", 400),
        ({"top_logprobs": 3}, "top_logprobs", 400),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", 400),
        ({"stream_options": {"include_jokes": True}}, "stream_options.include_jokes", 400),
        ({"stream_options": [True]}, "stream_options", 400),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", 400),
        ({"user": 7}, "user", 400),
        ({"metadata": "me"}, "metadata", 400),
        ({"top_a": 0.5}, "top_a", 400),
        ({"stream": "yes"}, "stream", 400),
        ({"tools": [{"type": "function"}]}, "tools", 400),
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
