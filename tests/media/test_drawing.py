"""Captions drawn into pictures and videos: seen at their time, readable, and nowhere else."""

import numpy as np
import pytest
from PIL import Image

from casa.media import drawing
from casa.media.drawing import draw_caption

GREY = (150, 150, 150)


def rows_changed(image, plain=GREY):
    return np.flatnonzero(np.abs(np.asarray(image).astype(int) - plain).max(axis=(1, 2)) > 30)


@pytest.mark.parametrize("size", [(336, 336), (1920, 1080), (48, 64), (64, 48), (40, 600), (600, 40), (2, 2), (1, 1)])
def test_a_band_at_the_foot(size):
    image = Image.new("RGB", size, GREY)
    seen = draw_caption(image, "Number 4071 appears, then 88 and another, longer number below")
    assert (seen.size, seen.mode) == (size, "RGB")
    rows = rows_changed(seen)
    assert rows[-1] == size[1] - 1
    assert list(rows) == list(range(rows[0], size[1]))
    assert np.asarray(image).std() == 0  # the original is left alone
    if min(size) >= 48:
        assert len(rows) <= size[1] * drawing.COVER + 1
        assert np.asarray(seen).min() < 80  # dark
        assert np.asarray(seen).max() > 220  # and letters on it


def test_letters_keep_inside_the_band_and_the_picture():
    seen = np.asarray(draw_caption(Image.new("RGB", (336, 336), GREY), "gjpqy " * 30)).astype(int)
    top = rows_changed(Image.fromarray(seen.astype(np.uint8)))[0]
    bright = np.argwhere(seen.min(axis=2) > 200)
    assert bright[:, 0].min() > top
    assert bright[:, 0].max() < 335
    assert bright[:, 1].min() > 2
    assert bright[:, 1].max() < 333


def test_wrapping():
    face = drawing._face(16, None)
    text = "one two three four " + "w" * 60
    lines = drawing._wrap(text, face, 120)
    assert all(face.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert drawing._wrap("a\nb", face, 120) == ["a", "b"]
    assert drawing._wrap("wide", face, 1) == ["w", "i", "d", "e"]


@pytest.mark.parametrize("text", ["", "  ", "\n\n"])
def test_silence_draws_nothing(text):
    image = Image.new("RGB", (64, 48), GREY)
    seen = draw_caption(image, text)
    assert seen.tobytes() == image.tobytes()
    assert seen is not image


def test_text_beyond_ascii(monkeypatch):
    """With DejaVu Sans it is set as it is; without, accents go and the letters stay."""
    image = Image.new("RGB", (336, 336), GREY)
    assert draw_caption(image, "é—ж").tobytes() != draw_caption(image, "?-?").tobytes()
    monkeypatch.setattr(drawing, "dejavu", lambda: None)
    assert drawing._settable("Ünïcode – “é”") == ('Unicode - "e"', None)
    assert drawing._settable("ж") == ("?", None)


def test_the_font_lies_in_matplotlib(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plain, bold = drawing.dejavu(), drawing.dejavu(bold=True)
    assert plain is not None
    assert bold is not None
    assert (plain.name, bold.name) == ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    empty = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    for found in (None, type("Spec", (), {"origin": None}), empty):
        monkeypatch.setattr(drawing, "find_spec", lambda name, found=found: found)
        assert drawing.dejavu() is None
