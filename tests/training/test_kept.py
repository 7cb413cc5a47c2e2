"""Image tokens that are kept: the same batch to the model, and no picture opened or encoded twice."""

import os
from pathlib import Path

import pytest
import torch

from casa.data.record import BadRecord, Picture
from casa.testing import tiny_casa, tiny_processor
from casa.training.collator import FeatureCache, FeatureFolder, PackCollator
from casa.training.config import TokenBudget
from casa.training.samples import SampleMaker

PROCESSOR = tiny_processor()
MAKE = SampleMaker(PROCESSOR, TokenBudget(1000, 1000))


@pytest.fixture(scope="module")
def model():
    return tiny_casa().requires_grad_(False)


def keeping(model, max_bytes=10**9):
    found = PackCollator(PROCESSOR)
    found.cache = FeatureCache(lambda pixels, grid: model.encode_images(pixels, grid), max_bytes)
    return found


def test_a_batch_says_the_same_and_the_second_opens_nothing(model, chat, picture, monkeypatch):
    samples = [
        MAKE(chat(("user", picture(56, 28), picture(84, 56, 1), "a"), ("assistant", "bc")))[0],
        MAKE(chat(("user", "d", picture(28, 28, 2)), ("assistant", "e")))[0],
    ]
    plain, kept = PackCollator(PROCESSOR)(samples), keeping(model)
    first = kept(samples)
    assert "pixel_values" not in first
    torch.testing.assert_close(model(**first).loss, model(**plain).loss, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr("casa.training.collator.open_one", lambda *_: pytest.fail("opened again"))
    second = kept(samples)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert (kept.cache.encodes, kept.cache.hits) == (3, 3)


def test_a_batch_without_pictures(model, chat):
    sample = MAKE(chat(("user", "d"), ("assistant", "e")))[0]
    kept = keeping(model)
    torch.testing.assert_close(model(**kept([sample])).loss, model(**PackCollator(PROCESSOR)([sample])).loss)
    assert kept.cache.held == 0


def test_what_does_not_fit_is_encoded_each_time(model, chat, picture):
    large = MAKE(chat(("user", picture(112, 112), "a"), ("assistant", "b")))[0]
    small = MAKE(chat(("user", picture(28, 28), "a"), ("assistant", "b")))[0]
    kept = keeping(model, max_bytes=1000)
    for _ in range(2):
        kept([large, small])
    assert (kept.cache.encodes, kept.cache.hits) == (3, 1)
    assert 0 < kept.cache.held <= 1000


def test_a_file_that_is_gone_is_a_bad_record(model, chat, picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(56, 56).source)
    sample = MAKE(chat(("user", Picture(path), "a"), ("assistant", "b")))[0]
    path.unlink()
    with pytest.raises(BadRecord, match=r"a\.png"):
        keeping(model).prepare(sample)


def test_a_file_that_changes_is_another_picture_and_so_is_a_smaller_one(model, chat, picture, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(224, 224).source)
    kept = keeping(model)
    sample = MAKE(chat(("user", Picture(path), "a"), ("assistant", "b")))[0]
    one = kept([sample])["image_features"]
    path.write_bytes(picture(224, 224, 5).source)
    os.utime(path, ns=(1, 1))
    other = kept([sample])["image_features"]
    assert not torch.equal(one, other)
    smaller = SampleMaker(PROCESSOR, TokenBudget(1000, 20))(chat(("user", Picture(path), "a"), ("assistant", "b")))[0]
    assert kept([smaller])["image_features"].shape[0] <= 20
    assert kept.cache.encodes == 3


def test_in_a_folder_a_file_is_known_by_where_it_really_lies(model, chat, picture, tmp_path, monkeypatch):
    made = []
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("a.png").write_bytes(picture(56, 56, number).source)
        os.truncate("a.png", 10_000)  # readers stop at the end of the picture; so both are of one size
        os.utime("a.png", ns=(1, 1))
        kept = PackCollator(PROCESSOR)
        kept.cache = FeatureCache(model.encode_images, 10**9, lambda: FeatureFolder(tmp_path / "features", "tower"))
        kept([MAKE(chat(("user", Picture(Path("a.png")), "a"), ("assistant", "b")))[0]])
        made.append(kept.cache.encodes)
    assert made == [1, 1]
