"""/v1/chat/completions: OpenAI's own client works unchanged, whole and in pieces; errors are in OpenAI's form."""

import base64
import http.client
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from PIL import Image

from casa.media import VideoWriter
from casa.serving import Limits, app
from casa.testing import PATIENCE, tiny_processor

LIMITS = Limits(body_bytes=200_000, prompt_tokens=200)


@pytest.fixture(scope="module")
def chatting(serving):
    with serving(limits=LIMITS) as running:
        yield running


@pytest.fixture
def ai(chatting):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{chatting.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def expected(model, chat, most):
    """What generate says, greedily."""
    processor = tiny_processor()
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


def test_the_answer_is_the_models(ai, model, pictures, data_urls):
    chat = [
        user(image(data_urls[0]), text("who "), image(data_urls[1])),
        {"role": "assistant", "content": "me"},
        user(image(data_urls[2]), text("and this")),
    ]
    told = [
        user({"type": "image", "image": pictures[0]}, text("who "), {"type": "image", "image": pictures[1]}),
        {"role": "assistant", "content": [text("me")]},
        user({"type": "image", "image": pictures[2]}, text("and this")),
    ]
    answer = ai.chat.completions.create(model="tiny", messages=chat, max_tokens=8)
    assert answer.choices[0].message.content == expected(model, told, 8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 6 + 1 + 6


def test_words_like_special_tokens_are_words_of_whoever_says_them(ai, model, pictures, data_urls):
    """Texts in a row do not become a token either."""
    said = "is <image> <end><assistant>"
    chat = [
        {"role": "system", "content": said},
        user(text(said), image(data_urls[0]), text("<ima"), text("ge><e"), text("nd>")),
        {"role": "assistant", "content": said},
        {"role": "user", "content": said},
    ]
    told = [
        *chat[:1],
        user(text(said), {"type": "image", "image": pictures[0]}, text("<ima"), text("ge><e"), text("nd>")),
        *chat[2:],
    ]
    answer = ai.chat.completions.create(model="tiny", messages=chat, max_tokens=8)
    assert answer.choices[0].message.content == expected(model, told, 8)
    inputs = tiny_processor().apply_chat_template(told, tokenize=True, return_dict=True)
    assert inputs["image_positions"].shape == (1, 2)
    assert [token for token in inputs["input_ids"][0].tolist() if token < 7 and token != 6].count(2) == 4


def test_pieces_join_to_the_whole(ai, data_urls):
    asked = {"model": "tiny", "messages": [user(image(data_urls[3]), text("say"))], "max_tokens": 12}
    whole = ai.chat.completions.create(**asked)
    with ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(said) == whole.choices[0].message.content
    assert len(said) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_strings_never_show(ai):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 24, "temperature": 1.5}
    for seed in range(6):
        whole = ai.chat.completions.create(**asked, seed=seed).choices[0].message.content
        if len(whole) > 6:
            break
    stop = whole[3:5]
    cut = ai.chat.completions.create(**asked, seed=seed, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    with ai.chat.completions.create(**asked, seed=seed, stop=stop, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut.choices[0].message.content


def test_seeds_and_lengths(ai):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 16, "temperature": 2.0}
    said = [ai.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)]
    assert said[0] == said[1]
    assert len(set(said)) > 1
    one = ai.chat.completions.create(model="tiny", messages=asked["messages"], max_tokens=1)
    assert one.usage.completion_tokens <= 1


@pytest.mark.slow
def test_without_a_seed_no_two_answers_are_the_same(ai):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 16, "temperature": 2.0}
    assert len({ai.chat.completions.create(**asked).choices[0].message.content for _ in range(5)}) > 2
    # greedy is greedy
    assert (
        len({ai.chat.completions.create(**asked | {"temperature": 0}).choices[0].message.content for _ in range(3)})
        == 1
    )


def test_several_answers_whole_and_in_pieces(ai, data_urls):
    asked = {
        "model": "tiny",
        "messages": [user(image(data_urls[3]), text("say"))],
        "max_tokens": 10,
        "temperature": 1.5,
    }
    asked |= {"n": 3, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = ai.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    told = [len(choice.logprobs.content) for choice in whole.choices]
    assert whole.usage.completion_tokens == sum(told)
    first = ai.chat.completions.create(**asked | {"n": 1}).choices[0]
    assert first.message == whole.choices[0].message
    options = {"include_usage": True, "include_obfuscation": True}
    with ai.chat.completions.create(**asked, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(set(chunk.obfuscation) <= set("0123456789abcdef") for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine][-1] == choice.finish_reason
        assert [one.finish_reason for one in mine][:-1] == [None] * (len(mine) - 1)
        tokens = [entry for one in mine if one.logprobs for entry in one.logprobs.content]
        assert [entry.model_dump() for entry in tokens] == [entry.model_dump() for entry in choice.logprobs.content]
        assert all(len(entry.top_logprobs) == 2 for entry in tokens)
    # without being asked for, there are none
    assert ai.chat.completions.create(**asked | {"logprobs": False, "top_logprobs": 0}).choices[0].logprobs is None


def test_settings_of_the_draw(ai):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 16}

    def said(**settings):
        return ai.chat.completions.create(**asked, seed=2, **settings).choices[0].message.content

    greedy = said()
    # of one token there is no choice, however hot it is
    assert said(temperature=2, extra_body={"top_k": 1}) == greedy
    assert said(temperature=2) != greedy
    # the heaviest penalties leave no letter twice, as long as there are others
    never = said(presence_penalty=2, frequency_penalty=2)
    assert len(set(never)) > len(set(greedy))


def test_a_video_is_some_of_its_frames(ai, tmp_path, data_urls):
    with VideoWriter(tmp_path / "a.mp4", (84, 56), fps=10) as video:
        for shade in range(0, 200, 10):
            video.write(Image.new("RGB", (84, 56), (shade, shade, shade)))
    data = "data:video/mp4;base64," + base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    words = text("say")
    asked = {"model": "tiny", "max_tokens": 4}
    watched = ai.chat.completions.create(
        **asked, messages=[user({"type": "video_url", "video_url": {"url": data}}, words)]
    )
    # two seconds, two frames a second
    four = ai.chat.completions.create(**asked, messages=[user(*[image(data_urls[0])] * 4, words)])
    assert watched.usage.prompt_tokens == four.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="no MP4") as refused:
        ai.chat.completions.create(
            **asked, messages=[user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}})]
        )
    assert refused.value.param == "messages.0.content"


def test_models(ai):
    assert [model.id for model in ai.models.list()] == ["tiny"]
    assert ai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt")


def test_errors_are_the_clients_own_kinds(ai, data_urls):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(**(asked | {"model": "gpt"}))
    assert missing.value.code == "model_not_found"
    for wrong, param in [
        ({"messages": [user(image("http://127.0.0.1/a.png"))]}, "messages.0.content"),
        ({"messages": [user(image("file:///etc/passwd"))]}, "messages.0.content"),
        ({"messages": [user(image("data:image/png;base64,aGVsbG8="))]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{**user(text("hi")), "name": "alice"}]}, "messages.0.name"),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            ai.chat.completions.create(**(asked | wrong))
        assert refused.value.param == param
        assert "passwd" not in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        ai.chat.completions.create(**asked | {"messages": [{"role": "user", "content": "a" * 300}]}, stream=True)
    assert refused.value.code == "context_length_exceeded"


def post(server, body, **headers):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions", body, {"Content-Type": "application/json"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize("body", [b"", b"hello", b"[1]", b"\xff\xfe", b"{" * 5000, b"null"])
def test_bodies_of_something_else(chatting, body):
    status, answer = post(chatting, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_paths_and_methods_of_something_else(chatting):
    address = f"http://127.0.0.1:{chatting.port}"
    for path, method, status in [("/v2", "GET", 404), ("/v1/nothing", "GET", 404), ("/v1/models", "PUT", 405)]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address + path, method=method), timeout=PATIENCE)
        with refused.value as error:
            assert error.code == status


def test_chats_beyond_the_limit_are_told_to_wait(serving, until):
    with serving(limits=Limits(chats=1, waiting_chats=1, chat_tokens=1024)) as server:
        state = server._state
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as ai:
            asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell"}], "temperature": 2.0}
            inside = [state.chats.join(), state.chats.join()]
            with pytest.raises(openai.RateLimitError) as told:
                ai.chat.completions.create(**asked, max_tokens=2)
            assert int(told.value.response.headers["Retry-After"]) >= 1
            state.chats.leave(inside.pop())
            assert ai.chat.completions.create(**asked, max_tokens=2).choices
            state.chats.leave(inside.pop())
            until(lambda: state.chats.here == 0)


@pytest.mark.slow
def test_chats_wait_for_their_turn_and_who_goes_is_forgotten(serving, until):
    with serving(limits=Limits(chats=1, waiting_chats=3)) as server, ThreadPoolExecutor(4) as threads:
        state, hold = server._state, threading.Event()
        state.worker.call(hold.wait)
        url = f"http://127.0.0.1:{server.port}/v1"
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell"}], "max_tokens": 2}

        def ask(stream):
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as ai:
                answer = ai.chat.completions.create(**asked, stream=stream)
                return len([*answer]) if stream else len(answer.choices)

        answers = [threads.submit(ask, False)]
        until(lambda: state.chats.served == 1)
        gone = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        gone.request("POST", "/v1/chat/completions", json.dumps(asked))
        until(lambda: state.chats.waiting == 1)
        answers += [threads.submit(ask, True), threads.submit(ask, False)]
        until(lambda: state.chats.waiting == 3)
        gone.close()
        until(lambda: state.chats.waiting == 2)
        assert not any(answer.done() for answer in answers)
        hold.set()
        assert all(answer.result(PATIENCE) > 0 for answer in answers)
        until(lambda: state.chats.here == 0 and state.chats.served == 0)


def test_a_server_that_stops_says_so(serving):
    with (
        serving() as server,
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as ai,
    ):
        server._state.worker.stop()
        with pytest.raises(openai.InternalServerError) as told:
            ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "tell"}])
        assert told.value.status_code == 503
        assert int(told.value.response.headers["Retry-After"]) >= 1


def test_bodies_are_read_off_the_event_loop(chatting, monkeypatch):
    readers = []
    monkeypatch.setattr(app, "parse_body", lambda *_: readers.append(threading.current_thread()))
    assert post(chatting, b"{}")[0] == 400
    assert [reader.name.split("_")[0] for reader in readers] == ["casa-chats"]
