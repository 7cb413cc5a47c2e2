"""Scenes: layout, clear answers, colours that show, and photographs that are at hand without a download, and split."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from casa.errors import UserError
from casa.evaluation import scenes
from casa.evaluation.example import CELL
from casa.evaluation.scenes import COLOURS, PHOTOS, PLACES, SHAPES, photo_crop, scene

SEEDS = range(51)


@pytest.fixture(scope="module")
def examples():
    return [scene(seed, split, turns=8) for seed in SEEDS for split in ("train", "held_out")]


def place_name(shape, image):
    column, row = int(shape.x * 3 // image.width), int(shape.y * 3 // image.height)
    return [
        ["top left", "top", "top right"],
        ["left", "centre", "right"],
        ["bottom left", "bottom", "bottom right"],
    ][row][column]


def test_layout(examples):
    for example in examples:
        shapes, (width, height) = example.meta["shapes"], example.image.size
        assert 1 <= len(shapes) <= 4
        assert width % CELL == height % CELL == 0
        assert 112 <= min(width, height) <= max(width, height) <= 448
        for i, a in enumerate(shapes):
            assert 34 <= a.diameter <= 110
            assert a.diameter / 2 <= a.x <= width - a.diameter / 2
            assert a.diameter / 2 <= a.y <= height - a.diameter / 2
            # a centre near a border of two ninths would have two answers
            assert all(abs(a.x - width * k / 3) >= 5 and abs(a.y - height * k / 3) >= 5 for k in (1, 2))
            for b in shapes[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > (a.diameter + b.diameter) / 2


def test_answers_are_true_and_clear(examples):
    seen = set()
    for example in examples:
        shapes = example.meta["shapes"]
        kinds = Counter(shape.kind for shape in shapes)
        looks = Counter((shape.colour, shape.kind) for shape in shapes)
        for turn in example.turns:
            seen.add(turn.kind)
            if match := re.fullmatch(r"What colour is the (\w+)\?", turn.question):
                assert kinds[match[1]] == 1
                assert turn.answer == next(s.colour for s in shapes if s.kind == match[1])
            elif turn.question == "How many shapes are there?":
                assert turn.answer == str(len(shapes))
            elif match := re.fullmatch(r"How many (\w+)s are there\?", turn.question):
                assert turn.answer == str(kinds[match[1]])
            elif match := re.fullmatch(r"Where is the (\w+) (\w+)\?", turn.question):
                assert looks[match[1], match[2]] == 1
                shape = next(s for s in shapes if (s.colour, s.kind) == (match[1], match[2]))
                assert turn.answer == place_name(shape, example.image)
            else:
                match = re.fullmatch(r"What is at the ([\w ]+)\?", turn.question)
                assert match
                there = [s for s in shapes if place_name(s, example.image) == match[1]]
                assert [f"a {s.colour} {s.kind}" for s in there] == [turn.answer]
    assert seen == {"colour", "count", "place", "what"}


def test_each_shape_is_painted_in_its_colour(examples):
    for example in examples:
        pixels = np.asarray(example.image).astype(float)
        for shape in example.meta["shapes"]:
            x, y = int(shape.x), int(shape.y)
            # the middle of every kind is filled
            middle = pixels[y - 3 : y + 4, x - 3 : x + 4].mean(axis=(0, 1))
            nearest = min(COLOURS, key=lambda name: float(np.abs(middle - COLOURS[name]).sum()))
            assert nearest == shape.colour


def test_all_kinds_colours_places_and_counts_occur(examples):
    shapes = [shape for example in examples for shape in example.meta["shapes"]]
    assert {shape.kind for shape in shapes} == set(SHAPES)
    assert {shape.colour for shape in shapes} == set(COLOURS)
    places = {place_name(s, example.image) for example in examples for s in example.meta["shapes"]}
    assert places == set(PLACES)


def test_same_seed_same_scene_other_split_other_scene():
    a, b, other = scene(3, "train"), scene(3, "train"), scene(3, "held_out")
    assert a.image.tobytes() == b.image.tobytes()
    assert a.turns == b.turns
    assert a.meta != other.meta


def test_a_kind_that_cannot_be_asked_gives_way_to_counting():
    for seed in range(60):
        example = scene(seed, "train", turns=("colour",))
        kinds = Counter(shape.kind for shape in example.meta["shapes"])
        if 1 not in kinds.values():
            assert example.turns[0].kind == "count"
            return
    pytest.fail("no scene without a single shape of a kind was drawn")


def test_wrong_wishes_are_refused():
    with pytest.raises(ValueError, match="'color' is no kind of scene question"):
        scene(0, turns=("color",))
    with pytest.raises(ValueError, match="multiples of 28 from 112 to 448"):
        scene(0, sizes=[(672, 112)])


def test_no_photograph_is_in_both_splits():
    assert not set(PHOTOS["train"]) & set(PHOTOS["held_out"])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_photograph_opens(split):
    for name in PHOTOS[split]:
        photo = scenes._photo(name)
        assert photo.mode == "RGB"
        assert max(photo.size) <= 800


@pytest.mark.parametrize("size", [(448, 448), (112, 448), (448, 112), (112, 112)])
def test_crops_fill_the_picture(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = photo_crop(*size, "held_out", rng)
        assert crop.shape == (*size, 3)
        assert crop.dtype == np.uint8
        assert crop.std() > 0


def test_a_missing_photograph_names_the_remedy():
    with pytest.raises(UserError, match="install scikit-image"):
        scenes._photo("no-such-photo.png")
