"""The picture of a pack: bars as long as budgets are full, windows as wide as their tokens, nothing beyond the edge."""

import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from casa.data import Origin, Picture
from casa.data.lettering import BARS
from casa.testing import tiny_processor
from casa.training.own.pack_sheet import EMPTY, LEARNED, WIDTH, draw_pack
from casa.training.samples import Budget, Sample, SizedPicture


def picture(tokens):
    held = io.BytesIO()
    Image.new("RGB", (30, 20), "#804000").save(held, "PNG")
    return SizedPicture(Picture(held.getvalue()), (2, 2), tokens)


def sample(text, learned, places=(), tokens=4):
    learn = (False,) * (text - learned) + (True,) * learned
    pictures = tuple(picture(tokens) for _ in places)
    return Sample((20,) * text, learn, tuple(places), pictures, Origin("pages.jsonl", 1))


@pytest.fixture
def drawn(tmp_path):
    tokenizer = tiny_processor().tokenizer

    def draw(samples, **how):
        path = tmp_path / "pack.png"
        draw_pack(samples, path, budget=Budget(100, 50), tokenizer=tokenizer, title="a pack", **how)
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    return draw


def share(row, colour):
    return float((row == ImageColor.getrgb(colour)).all(-1).sum())


def test_bars_are_as_long_as_budgets_are_full(drawn):
    page = drawn([sample(20, 5, (2,), 25), sample(30, 10)])
    text, image = page[104], page[144]
    whole = sum(share(text, colour) for colour in (*BARS, EMPTY))
    assert share(text, BARS[0]) / whole == pytest.approx(0.2, abs=0.01)
    assert share(text, BARS[1]) / whole == pytest.approx(0.3, abs=0.01)
    assert share(image, BARS[0]) / whole == pytest.approx(0.5, abs=0.01)
    assert share(image, BARS[1]) == 0


def test_what_is_learned_is_green(drawn):
    def green(page):
        return share(page[230:].reshape(-1, 3), LEARNED)

    few, many = drawn([sample(20, 5, (2,))]), drawn([sample(20, 10, (2,))])
    assert green(many) == pytest.approx(2 * green(few), rel=0.01)


@pytest.mark.parametrize(
    "pack",
    [
        [sample(1200, 900, range(0, 1200, 5))],
        [sample(3, 1, (0,), 100_000)],
        [sample(60_000, 1)],
        [sample(4, 2)] * 60,
        [sample(8, 2, (1, 1, 1, 4), 9)],
        [],
    ],
    ids=["windows", "picture", "text", "samples", "runs", "nothing"],
)
@pytest.mark.parametrize("split", ["image", "sample"])
def test_any_pack_fits(drawn, pack, split):
    page = drawn(pack, split=split)
    assert page.shape[1] == WIDTH
    assert page.shape[0] < 6000
    # the margin is free
    assert len(np.unique(page[230:, -20:].reshape(-1, 3), axis=0)) == 1
