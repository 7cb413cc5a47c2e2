"""Casa beside what users would pick: all watch the same film, and each holds what its way of seeing says."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from casa.benchmarks import peers
from casa.benchmarks.decode import ALL
from casa.benchmarks.peers import CROSS, INSERTION, PROMPT, WINDOW, Fused, bench_peers, move, new_peers
from casa.benchmarks.settings import PeersSettings
from casa.errors import UserError
from casa.models.cache import CACHE
from casa.testing import tiny_text_model

TOKENS, IMAGE = 4, 4  # said of a frame; image tokens of one
SETTINGS: dict[str, Any] = {
    "turns": (1, 5),
    "samples": 2,
    "tokens": TOKENS,
    "sinks": 8,
    "window_text": 10,
    "window_frames": 2,
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(peers, "TOWER", tower | {"image_size": 64, "patch_size": 8})
    tiny_text_model().save_pretrained(tmp_path)
    return PeersSettings(str(tmp_path), dtype="fp32", **SETTINGS)


@pytest.mark.slow
def test_all_watch_the_same_film(small, tmp_path):
    found = bench_peers(small)
    names = [INSERTION, WINDOW, CROSS, "CASA every 3", ALL]
    assert list(found.figures) == ["turns", *names]
    held = {name: found.figures[name]["cache_bytes"] for name in names}
    token = 2 * 3 * 2 * 8 * 4  # keys and values of three blocks, two heads of 8 channels, in fp32
    # medians of turns 1 and 2, and of 5 and 6; insertion holds every image token in every block
    turns = [1.5, 5.5]
    assert held[INSERTION] == [token * (PROMPT + turn * (TOKENS + IMAGE)) for turn in turns]
    # held before its turn ends: what the last turn left, and this turn
    assert held[WINDOW][1] == token * (8 + 10 + 2 * IMAGE + TOKENS + IMAGE)
    assert held[CROSS] == [token * (PROMPT + turn * (TOKENS + IMAGE / 3)) for turn in turns]
    assert held["CASA every 3"][1] - held["CASA every 3"][0] == token * 4 * TOKENS
    assert found.table.count("\n") == 5
    found.plot(tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


@torch.inference_mode()
def test_all_have_the_same_eyes_and_the_same_words(small):
    made, pixels = new_peers(small)
    prompt, word = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9]])
    text = [made[name] for name in (INSERTION, WINDOW, ALL)]
    for peer in text:
        peer.begin(prompt)
    first, *others = [peer.model(input_ids=word, **{CACHE: peer.cache}).logits for peer in text]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)
    inserted, fused = made[INSERTION], made[ALL]
    assert isinstance(fused, Fused)
    features = fused.model.get_image_features(pixels, fused.frame["image_grid_thw"]).pooler_output[0]
    torch.testing.assert_close(features, inserted.encode(pixels), atol=1e-5, rtol=1e-5)


def test_a_published_shape_is_watched_by_both_methods():
    found = bench_peers(PeersSettings(shape="tiny", image_tokens=6, **SETTINGS))
    assert list(found.figures) == ["turns", INSERTION, ALL]
    assert found.figures[INSERTION]["cache_bytes"][1] > found.figures[ALL]["cache_bytes"][1]


@torch.inference_mode()
def test_what_stays_in_the_window_stands_side_by_side():
    """In one block keys depend on their own token alone, so that what is left is a text of its own."""
    model = tiny_text_model(num_hidden_layers=1).eval()
    ids, kept = torch.arange(3, 15)[None], torch.tensor([0, 1, 5, 6, 11])
    left, alone = DynamicCache(), DynamicCache()
    model(input_ids=ids, **{CACHE: left})
    model(input_ids=ids[:, kept], **{CACHE: alone})
    move(left, kept, model.model.rotary_emb)
    word = torch.tensor([[20]])
    found, wanted = (model(input_ids=word, **{CACHE: cache}).logits for cache in (left, alone))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"turns": (1, 2)}, "turns"),
        ({"turns": (0, 64)}, "turns"),
        ({"turns": ()}, "turns"),
    ],
)
def test_what_cannot_be_is_told(settings, words):
    with pytest.raises(UserError, match=words):
        PeersSettings(**settings)
