"""A chat about a picture that a chat was about: nothing is encoded or projected again, unless the token is another."""

import json
import urllib.request

import pytest

from casa.models import ImageCache


@pytest.fixture
def counted(model, monkeypatch):
    calls = []
    for name in ("encode_images", "image_keys_values"):
        inner = getattr(type(model), name)

        def noted(self, *given, name=name, inner=inner):
            calls.append(name)
            return inner(self, *given)

        monkeypatch.setattr(type(model), name, noted)
    return calls


def ask(server, url, question, token=None):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    address = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_the_second_chat_encodes_and_projects_nothing(serving, data_urls, counted):
    with serving() as server:
        first = ask(server, data_urls[0], "what")
        assert counted == ["encode_images", "image_keys_values"]
        ask(server, data_urls[0], "who")
        assert ask(server, data_urls[0], "what") == first
        assert len(counted) == 2
        ask(server, data_urls[1], "what")
        assert len(counted) == 4


def test_off_is_off(serving, data_urls, counted):
    with serving(image_cache="off") as server:
        ask(server, data_urls[0], "what")
        ask(server, data_urls[0], "what")
        assert len(counted) == 4


def test_servers_with_another_token_share_nothing(serving, data_urls, counted, tmp_path):
    for token, calls in (("one", 2), ("one", 2), ("two", 4), (None, 6)):
        with serving(token=token, image_cache=ImageCache(folder=tmp_path)) as server:
            ask(server, data_urls[0], "what", token)
            assert len(counted) == calls, token
