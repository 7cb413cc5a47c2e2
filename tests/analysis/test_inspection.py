"""An answer looked into is what the model does step by step, and the page holds its numbers and nothing from afar."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from casa.analysis.inspect_page import page_data, write_inspection
from casa.analysis.inspection import inspect_answer
from casa.errors import UserError
from casa.testing import noise_frames, tiny_casa, tiny_processor


@pytest.fixture(params=["casa", "insertion", "cross_attention"], scope="module")
def found(request):
    return look(tiny_casa(method=request.param), 2)


def look(model, pictures, **settings):
    model.generation_config.eos_token_id = 2
    shown = [Image.fromarray(frame) for frame in noise_frames(0, pictures)]
    return inspect_answer(model, tiny_processor(), shown, "what is it?", **{"max_new_tokens": 5} | settings)


def decoded(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_every_token_of_text_and_answer_is_there(found):
    said = [token.text for token in found.tokens if token.answered]
    # <user>, two pictures with their delimiters, the question, <end>, <assistant>, the answer
    assert len(found.tokens) == 1 + 2 + 11 + 2 + len(said)
    assert 1 <= len(said) <= 5
    assert found.shares.tokens == tuple(range(len(found.tokens)))
    # all but the first token see a picture
    total = found.shares.shares.sum(0)[..., 1:]
    torch.testing.assert_close(total, torch.ones_like(total))
    # the last block's best guess is the next token, which greedy decoding took
    for place, token in enumerate(found.tokens):
        if token.answered:
            assert found.guesses[-1][place - 1][0] == token.text
            assert float(found.lens.probabilities[-1, place - 1, 0]) == pytest.approx(token.probability, rel=1e-4)


def test_the_page_holds_the_numbers(found):
    data = page_data(found)
    layers, heads, rows, _ = found.shares.weights.shape
    columns = found.shares.num_columns
    assert (data["heads"], data["mapHeads"], data["rows"], data["columns"]) == (heads, heads, rows, columns)
    shares = decoded(data["shares"], "<f4").reshape(4, layers, heads, rows)
    np.testing.assert_allclose(shares, found.shares.shares.numpy(), atol=1e-6)
    scale = decoded(data["scales"], "<f4").reshape(rows, layers, heads, 1)
    maps = (decoded(data["maps"], np.uint8).reshape(rows, layers, heads, columns) / 255.0) ** 2 * scale
    wanted = found.shares.weights[..., :columns].permute(2, 0, 1, 3).numpy()
    assert np.abs(maps - wanted).max() < 0.005
    places = [(token["writes"], token["reads"]) for token in data["tokens"]]
    assert places == [(n - 1, n) for n in range(rows)]
    assert [image["grid"] for image in data["images"]] == list(found.shares.grids)
    assert decoded(data["norms"]["tokens"], "<f4").tolist() == found.norms.tokens.tolist()


def test_a_page_that_would_be_too_large_leaves_out_the_question_and_then_heads(found):
    layers, heads = found.shares.weights.shape[:2]
    answered = sum(token.answered for token in found.tokens)
    each = layers * heads * found.shares.num_columns
    without = page_data(found, each * (answered + 1))
    assert (without["rows"], without["mapHeads"]) == (answered + 1, heads)
    assert without["tokens"][-1]["writes"] == answered - 1
    assert without["tokens"][1]["writes"] == -1
    means = page_data(found, each)
    assert (means["rows"], means["mapHeads"], len(means["notes"])) == (answered + 1, 1, 2)


def test_the_page_stands_alone(tmp_path, found):
    path = tmp_path / "page.html"
    write_inspection(path, found, model="mine")
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|src=(?!\")|@import", page)
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert json.loads(held)["tokens"][0]["text"] == "<user>"
    assert "<" not in held  # what is said cannot end the script
    assert "what is it?" in page


def test_other_words_can_be_looked_into():
    found = look(tiny_casa(), 1, answer="no")
    assert [token.text for token in found.tokens if token.answered] == ["n", "o", "<end>"]
    assert found.answer == "no"


def test_self_attention_of_a_casa_model_has_a_page_too(tmp_path):
    found = look(tiny_casa(), 1, self_attention=True)
    data = page_data(found)
    assert (data["columns"], data["images"][0]["start"]) == (0, -1)
    write_inspection(tmp_path / "page.html", found)


def test_bad_requests_are_refused(tmp_path, found):
    with pytest.raises(UserError, match="give a picture"):
        look(tiny_casa(), 0)
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_inspection(tmp_path / "page.png", found)
