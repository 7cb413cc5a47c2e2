"""What casa-tiny was trained on: never a held-out scan or photograph, and dense targets that say what is drawn."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from casa.evaluation import CELL, handwriting, page, scene, scenes, stream
from casa.evaluation.handwriting import FIRST_HELD_OUT
from casa.evaluation.scenes import COLOURS, PHOTOS, SHAPES, SceneShape
from casa.evaluation.stream import next_number
from projects.casa_tiny.targets import (
    CHANNELS,
    EMPTY,
    UNSAID,
    dense_targets,
    empty_targets,
    owners,
    page_targets,
    scene_targets,
)
from projects.casa_tiny.tasks import CLIPS, PICTURES, kindred, sheets


@dataclass
class Drawn:
    """scans: whose ink was read, kin among them. photos: that were cut from."""

    scans: set[int] = field(default_factory=set)
    photos: set[str] = field(default_factory=set)


@dataclass
class Watched:
    """All scans as `render_digits` reads them, one after the other in one row; notes which ones it does."""

    ink: np.ndarray
    seen: Drawn

    def reshape(self, _):
        return self

    def take(self, index):
        # (n, h, w): each digit is of one scan
        self.seen.scans.update((index[:, 0, 0] // self.ink[0].size).tolist())
        return self.ink.reshape(-1).take(index)


@pytest.fixture
def seen(monkeypatch):
    found, masters, photo = Drawn(), handwriting._masters(), scenes._photo

    def shown(name):
        found.photos.add(name)
        return photo(name)

    monkeypatch.setattr(handwriting, "_masters", lambda: Watched(masters, found))
    monkeypatch.setattr(scenes, "_photo", shown)
    return found


@pytest.mark.parametrize("name", [*PICTURES, *CLIPS])
def test_a_source_draws_from_training_scans_and_photographs_alone(name, seen):
    rng = np.random.default_rng(0)
    for _ in range(8):
        if name in CLIPS:
            CLIPS[name](rng)
        else:
            PICTURES[name](rng, (224, 224))
    assert seen.scans or seen.photos
    assert all(scan < FIRST_HELD_OUT for scan in seen.scans)
    assert seen.photos <= set(PHOTOS["train"])


def test_the_watch_sees_what_evaluation_draws(seen):
    drawn = page(0, "held_out")
    assert seen.scans >= {glyph.scan for glyph in drawn.meta["glyphs"]}
    assert min(seen.scans) >= FIRST_HELD_OUT
    for seed in range(4):
        scene(seed, "held_out")
    assert seen.photos
    assert seen.photos <= set(PHOTOS["held_out"])


def test_empty_targets_show_nothing():
    dense = empty_targets(112, 168)
    assert set(dense) == set(CHANNELS)
    for name, cells in dense.items():
        assert cells.shape == (4, 6)
        assert cells.dtype == np.int64
        if name not in ("across", "down"):
            assert (cells == (10 if name == "digit" else 0)).all()


def test_every_cell_says_where_it_is():
    dense = empty_targets(504, 84)
    assert dense["down"].tolist() == [[n] * 3 for n in range(1, 19)]
    assert dense["across"].tolist() == [[4, 10, 16]] * 18
    assert empty_targets(672, 672)["across"].max() == CHANNELS["across"] - 1 == 18


def test_channels_are_separate_arrays():
    dense = empty_targets(112, 112)
    dense["line"][0, 0] = 1
    assert dense["column"][0, 0] == 0


def test_a_cell_goes_to_the_box_that_covers_most_of_it():
    boxes = np.array([[0.0, 0, 42, 28], [42, 0, 84, 28]])
    centres = np.array([[21.0, 14], [63, 14]])
    # each box covers half of the middle cell: the tie goes to the first, and each owns its centre's cell
    np.testing.assert_array_equal(owners(boxes, centres, 2, 3), [[0, 0, 1], [-1, -1, -1]])


def test_a_small_thing_still_owns_the_cell_under_its_centre():
    boxes = np.array([[0.0, 0, 27, 28], [27, 0, 29, 28]])
    centres = np.array([[13.0, 14], [28, 14]])
    np.testing.assert_array_equal(owners(boxes, centres, 1, 2), [[0, 1]])


@pytest.fixture(scope="module")
def drawn_pages():
    return [page(seed, split) for seed in range(30) for split in ("train", "held_out")]


def read_back(dense):
    """The lines of a page, from its dense targets alone."""
    found = {}
    for digit, line, column in zip(
        *(dense[name].ravel().tolist() for name in ("digit", "line", "column")), strict=True
    ):
        if line:
            found.setdefault((line, column), set()).add(digit)
    assert all(len(digits) == 1 for digits in found.values())
    lines = {}
    for (line, _), digits in sorted(found.items()):
        lines[line] = lines.get(line, "") + str(next(iter(digits)))
    return tuple(lines[number] for number in sorted(lines))


def test_dense_targets_hold_every_line(drawn_pages):
    for example in drawn_pages:
        assert read_back(dense_targets(example)) == example.meta["lines"]


def test_dense_channels_agree_with_each_other(drawn_pages):
    for example in drawn_pages:
        dense, lines = dense_targets(example), example.meta["lines"]
        inked = dense["digit"] != 10
        assert set(dense) == set(CHANNELS)
        for name, cells in dense.items():
            assert cells.shape == (example.image.height // CELL, example.image.width // CELL)
            assert cells.min() >= 0
            assert cells.max() < CHANNELS[name]
        for name in ("line", "column", "last", "length", "lines"):
            np.testing.assert_array_equal(dense[name] > 0, inked)
        assert set(dense["lines"][inked]) == {len(lines)}
        lengths = np.array([0, *map(len, lines)])
        np.testing.assert_array_equal(dense["length"], lengths[dense["line"]])
        np.testing.assert_array_equal(dense["last"] == 2, inked & (dense["column"] == dense["length"]))
        assert not any(dense[name].any() for name in ("shape", "colour", "count", "place", "shapes"))


def test_dense_targets_hold_every_shape():
    for example in (scene(seed, split) for seed in range(30) for split in ("train", "held_out")):
        shapes, dense = example.meta["shapes"], dense_targets(example)
        for name, cells in dense.items():
            assert cells.shape == (example.image.height // CELL, example.image.width // CELL)
            assert 0 <= cells.min() <= cells.max() < CHANNELS[name]
        assert (dense["digit"] == 10).all()
        assert not dense["line"].any()
        found = {
            ordinal: (SHAPES[shape - 1], list(COLOURS)[colour - 1], place - 1, count, total)
            for ordinal, shape, colour, place, count, total in zip(
                *(dense[n].ravel() for n in ("ordinal_all", "shape", "colour", "place", "count", "shapes")),
                strict=True,
            )
            if ordinal
        }
        kinds = Counter(shape.kind for shape in shapes)
        assert found == {
            i: (s.kind, s.colour, s.place(example.image.height, example.image.width), kinds[s.kind], len(shapes))
            for i, s in enumerate(shapes, start=1)
        }


def test_ordinals_count_shapes_of_one_kind_in_reading_order():
    shapes = [
        SceneShape("star", "red", 40, 40, 40),
        SceneShape("circle", "blue", 120, 40, 40),
        SceneShape("star", "blue", 40, 120, 40),
    ]
    dense = scene_targets(shapes, 168, 168)
    assert dense["ordinal"][1, 1] == 1
    assert dense["ordinal"][1, 4] == 1
    assert dense["ordinal"][4, 1] == 2
    assert dense["ordinal_all"][4, 1] == 3
    assert dense["count"][1, 1] == 2


def test_no_shapes_leave_all_cells_empty():
    assert not scene_targets([], 112, 112)["shape"].any()


def test_dense_targets_read_like_the_number():
    for example in (stream(seed, split, seconds=8) for seed in range(8) for split in ("train", "held_out")):
        for t in example.times():
            number = example.visible(t)
            dense = page_targets(example.glyphs(t), example.height, example.width)
            read = {}
            for digit, line, column in zip(
                *(dense[n].ravel().tolist() for n in ("digit", "line", "column")), strict=True
            ):
                if line:
                    assert line == 1
                    read.setdefault(column, set()).add(digit)
            text = number.text if number else ""
            assert {column: {int(d)} for column, d in enumerate(text, start=1)} == read


@pytest.mark.parametrize("size", [(112, 112), (112, 672), (672, 112), (448, 448)])
def test_a_sheet_is_full(size):
    drawn = sheets(np.random.default_rng(3), size)
    assert drawn.image.size == size[::-1]
    assert drawn.turns == ()
    assert (dense_targets(drawn)["digit"] != EMPTY["digit"]).mean() > 0.5
    assert len(drawn.meta["glyphs"]) > 3 * len(page(3, sizes=[size]).meta["glyphs"]) or size == (112, 112)


def test_the_cell_under_a_digit_of_a_sheet_says_which():
    drawn = sheets(np.random.default_rng(5), (448, 336))
    digits, cells = dense_targets(drawn)["digit"], set()
    for glyph in drawn.meta["glyphs"]:
        x, y = glyph.centre
        cells.add((int(y // CELL), int(x // CELL)))
        assert digits[int(y // CELL), int(x // CELL)] == glyph.digit
    assert len(cells) == len(drawn.meta["glyphs"])


def test_a_sheet_says_nothing_about_lines_and_that_there_are_no_shapes():
    dense = dense_targets(sheets(np.random.default_rng(1), None))
    assert all((dense[name] == UNSAID).all() for name in ("line", "column", "last", "length", "lines"))
    assert not dense["shape"].any()


def test_the_same_numbers_draw_the_same_sheet():
    one, again, other = (np.asarray(sheets(np.random.default_rng(seed), (224, 224)).image) for seed in (7, 7, 8))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_kindred_numbers_differ_in_a_digit():
    def always(previous, rng):
        return kindred(previous, rng) if previous else next_number(previous, rng)

    alike = followed = 0
    for seed in range(20):
        said = [caption for caption in stream(seed, "train", seconds=16, follow=always).captions() if caption]
        for before, after in itertools.pairwise(said):
            followed += 1
            shorter, longer = sorted((before, after), key=len)
            if len(before) == len(after):
                alike += sum(a != b for a, b in zip(before, after, strict=True)) == 1
            else:
                alike += shorter in (longer[1:], longer[:-1])
    assert alike == followed > 40
