"""Sheets: full of handwriting, cell by cell what the glyphs say, nothing about lines, and no question."""

import numpy as np
import pytest

from casa.evaluation import CELL, page, sheet
from casa.evaluation.example import NO_DIGIT, UNSAID
from casa.evaluation.ink import FIRST_HELD_OUT


@pytest.mark.parametrize("size", [(112, 112), (112, 672), (672, 112), (448, 448)])
def test_a_sheet_is_full(size):
    drawn = sheet(3, sizes=[size])
    assert drawn.image.size == size[::-1]
    assert drawn.turns == ()
    assert (drawn.dense["digit"] != NO_DIGIT).mean() > 0.5
    assert len(drawn.meta["glyphs"]) > 3 * len(page(3, sizes=[size]).meta["glyphs"]) or size == (112, 112)


def test_the_cell_under_a_digit_says_which():
    drawn = sheet(5, sizes=[(448, 336)])
    cells = set()
    for glyph in drawn.meta["glyphs"]:
        x, y = glyph.centre
        cells.add((int(y // CELL), int(x // CELL)))
        assert drawn.dense["digit"][int(y // CELL), int(x // CELL)] == glyph.digit
    assert len(cells) == len(drawn.meta["glyphs"])


def test_it_says_nothing_about_lines_and_that_there_are_no_shapes():
    dense = sheet(1).dense
    assert all((dense[name] == UNSAID).all() for name in ("line", "column", "last", "length", "lines"))
    assert not dense["shape"].any()


def test_the_same_seed_draws_the_same_sheet_and_splits_share_no_scan():
    assert np.array_equal(np.asarray(sheet(7).image), np.asarray(sheet(7).image))
    assert not np.array_equal(np.asarray(sheet(7).image), np.asarray(sheet(8).image))
    assert all(glyph.scan < FIRST_HELD_OUT for glyph in sheet(7, "train").meta["glyphs"])
    assert all(glyph.scan >= FIRST_HELD_OUT for glyph in sheet(7, "held_out").meta["glyphs"])
