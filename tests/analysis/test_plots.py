"""The figures are written whole, show what they should, and are not blank."""

import sys

import numpy as np
import pytest
from PIL import Image

from casa.analysis.attention_maps import attention_shares
from casa.analysis.plots import plot_attention, plot_cost
from casa.analysis.streaming_cost import Cost, CostRow
from casa.errors import UserError
from casa.streaming import Usage
from casa.testing import TinySample, tiny_casa


def cost(size, seconds):
    return Cost(seconds, Usage(10, 6, size, size, 0, 0))


def row(number, rival=True):
    return CostRow("7", 2, cost(2**20, 0.05), cost(2**20 * number, 0.05 + 0.01 * number) if rival else None)


def share_of(path, colour):
    """The share of pixels that are nearly this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(axis=2) < 12).mean())


BLUE, ORANGE, GREEN = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)


@pytest.mark.slow
def test_cost_shows_both_sessions(tmp_path):
    plot_cost([row(n + 1, rival=n < 20) for n in range(30)], tmp_path / "memory.png")
    with Image.open(tmp_path / "memory.png") as drawn:
        assert drawn.size == (1350, 555)
    assert share_of(tmp_path / "memory.png", BLUE) > 0.002
    assert share_of(tmp_path / "memory.png", ORANGE) > 0.002
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]


@pytest.mark.slow
def test_one_frame_and_no_rival_can_be_drawn(tmp_path):
    plot_cost([row(1, rival=False)], tmp_path / "memory.png")
    assert share_of(tmp_path / "memory.png", ORANGE) == 0


@pytest.mark.slow
def test_attention_shows_three_lines_and_the_picture(tmp_path):
    shares = attention_shares(tiny_casa(), TinySample((5, 9, 17), ((1, 4, 6),)).inputs())
    picture = Image.new("RGB", (168, 112), (250, 250, 250))
    plot_attention(shares, picture, tmp_path / "a.png", token=2, written="[7]")
    plot_attention(shares, Image.new("RGB", (168, 112)), tmp_path / "b.png", token=2, written="[7]")
    for colour in (BLUE, ORANGE, GREEN):
        assert share_of(tmp_path / "a.png", colour) > 0.0005
    a, b = (np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("a.png", "b.png"))
    differs = np.abs(a - b).max(axis=2) > 20
    assert differs[:, :600].sum() == 0  # the lines do not depend on the picture, its half does
    assert differs[:, 700:].mean() > 0.1


@pytest.mark.slow
def test_the_same_figure_has_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plot_cost([row(n + 1) for n in range(5)], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no frame"):
        plot_cost([], tmp_path / "memory.png")
    with pytest.raises(UserError, match="does not exist"):
        plot_cost([row(1)], tmp_path / "nowhere" / "memory.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"install casa-vlm\[plots\]"):
        plot_cost([row(1)], tmp_path / "memory.png")
    assert not list(tmp_path.iterdir())
