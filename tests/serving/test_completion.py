"""A completion in slices says what it says in one go, and waits for one picture at most."""

import pytest
import torch

from casa.serving import Limits
from casa.serving.chat_request import RequestError, read_chat
from casa.serving.completion import Completion
from casa.testing import tiny_processor


@pytest.fixture
def asked(data_urls):
    def make(**changes):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in data_urls[:3]]
        content = [*parts, {"type": "text", "text": "say"}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
        return read_chat(body | changes, "tiny", Limits(), False)

    return make


def begun(model, request, most=8192):
    pieces = []
    return Completion(model, tiny_processor(), request, most, pieces.append), pieces


def test_slices_join_to_the_whole(model, asked, monkeypatch):
    whole, at_once = begun(model, asked())
    assert whole.advance(float("inf"))
    encoded = []
    encode = type(model).encode_images

    def noted(self, pixels, grid):
        encoded.append(len(grid))
        return encode(self, pixels, grid)

    monkeypatch.setattr(type(model), "encode_images", noted)
    sliced, in_turns = begun(model, asked())
    turns, seen = 0, []
    while not sliced.advance(0):
        turns += 1
        seen.append(sum(encoded))
    # the prompt, three pictures, and then a token at a time
    assert encoded == [1, 1, 1]
    assert seen[:4] == [0, 1, 2, 3]
    assert "".join(p.text for p in in_turns) == "".join(p.text for p in at_once)
    assert (sliced.prompt_tokens, sliced.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert turns >= 4


def test_what_nobody_wants_any_more_ends(model, asked):
    work, pieces = begun(model, asked())
    work.advance(0)
    work.cancelled = True
    assert work.advance(float("inf"))
    assert pieces == []


def test_pictures_count_towards_the_prompt(model, asked):
    work, _ = begun(model, asked(), most=10)
    with pytest.raises(RequestError, match="at most 10"):
        work.advance(float("inf"))


def test_a_temperature_next_to_nothing_is_greedy(model, asked):
    greedy, plain = begun(model, asked(temperature=0))
    cold, icy = begun(model, asked(temperature=1e-320))
    with torch.no_grad():
        assert greedy.advance(float("inf"))
        assert cold.advance(float("inf"))
    assert [piece.text for piece in plain] == [piece.text for piece in icy]


def test_a_chat_that_the_template_refuses_is_the_clients_error(model, asked):
    processor = tiny_processor()
    processor.chat_template = "{% if messages|length > 1 %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    request = asked(messages=[{"role": "user", "content": "a"}] * 2)
    with pytest.raises(RequestError, match="chat template refuses this chat: Roles must alternate!") as caught:
        Completion(model, processor, request, 8192, print).advance(float("inf"))
    assert (caught.value.status, caught.value.param) == (400, "messages")
