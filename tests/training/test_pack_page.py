"""The page of a pack: bars as long as budgets are full, windows with their pictures and text, whatever is in it."""

import io
import re

import pytest
from PIL import Image

from casa.data import Origin, Picture
from casa.testing import tiny_processor
from casa.training.config import TokenBudget
from casa.training.plan import write_pack
from casa.training.samples import SizedPicture, TrainingSample


def picture(tokens):
    held = io.BytesIO()
    Image.new("RGB", (30, 20), "#804000").save(held, "PNG")
    return SizedPicture(Picture(held.getvalue()), (2, 2), tokens)


def sample(text, learned, places=(), tokens=4):
    learn = (False,) * (text - learned) + (True,) * learned
    pictures = tuple(picture(tokens) for _ in places)
    return TrainingSample((20,) * text, learn, tuple(places), pictures, Origin("/home/me/pages.jsonl", 1))


@pytest.fixture
def page(tmp_path):
    tokenizer = tiny_processor().tokenizer

    def write(samples, **how):
        path = tmp_path / "pack.html"
        write_pack(samples, path, budget=TokenBudget(100, 50), tokenizer=tokenizer, title="a pack", **how)
        return path.read_text(encoding="utf-8")

    return write


def test_bars_say_how_full_budgets_are(page):
    found = page([sample(20, 5, (2,), 25), sample(30, 10)])
    assert "50 of 100 tokens (50 %)" in found
    assert "25 of 50 tokens (50 %)" in found
    assert "1 picture, 25 image tokens, 20 text tokens, 5 learned" in found
    assert "/home/me" not in found


def test_what_is_learned_is_as_wide_as_its_tokens(page):
    def learned(text):
        return [int(width) for width in re.findall(r'<i class="learned" style="--wide:(\d+)"', text)]

    found = page([sample(20, 5, (2, 9)), sample(20, 10)])
    assert learned(found) == [5, 10]
    # two tokens before the first picture are a window of their own, which sees nothing
    assert found.count('<section class="window') == 4
    assert page([sample(20, 5, (2, 9))], split="sample").count('<section class="window') == 1


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
def test_any_pack_is_shown(page, pack, split):
    found = page(pack, split=split)
    assert found.rstrip().endswith("</html>")
    assert len(found) < 400_000
