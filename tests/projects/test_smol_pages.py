"""Pages drawn by seed, and what their cells are said to hold."""

import json

import numpy as np
import pytest

from casa.vision.page_reading import FOLLOWING
from projects.casa_smol.canvas import CLASS_OF, COLOURS, Canvas, colours_of
from projects.casa_smol.damage import placed, worn
from projects.casa_smol.fonts import CHARACTERS, LISTED, kin_of, kins, split_of
from projects.casa_smol.pages import LAYOUTS, draw
from projects.casa_smol.targets import NO_INK, UNKNOWN, page, targets_of
from projects.casa_smol.words import Words, is_held_out, word_list


def written(text="Hi, you", size=24):
    canvas = Canvas((160, 64), (255, 255, 255))
    canvas.text(10, 40, text, kins("train")[0][0], size, (200, 0, 0))
    return canvas


def test_a_page_is_its_seeds():
    (one, first, _), (two, second, _), (three, _, _) = (page(seed, (96, 64)) for seed in ((1, 2), (1, 2), (1, 3)))
    assert one.shape == (64, 96, 3)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    for name, values in vars(first).items():
        assert np.array_equal(values, getattr(second, name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_what_it_remembers(layout):
    canvas = draw(np.random.default_rng(5), (256, 256), "train", layout)
    glyphs = canvas.found()
    assert len(glyphs.classes) > 20
    # where the picture differs from its ground, there are characters, and the other way round
    differs = (np.asarray(canvas.image) != np.asarray(canvas.ground)).any(-1)
    near = np.zeros_like(differs)
    for (left, _, right, _), (top, bottom) in zip(glyphs.boxes, glyphs.lines, strict=True):
        rise = (bottom - top) * 0.5  # accents and slanted letters
        rows = slice(max(0, int(top - rise)), max(0, int(bottom + rise)))
        columns = slice(max(0, int(left - rise)), max(0, int(right + rise)))
        near[rows, columns] = True
    assert not (differs & ~near).any()


def test_the_text_is_read_back_from_the_centres():
    canvas = written()
    found = targets_of(canvas.found(), np.asarray(canvas.ground))
    assert "".join(CHARACTERS[number - 1] for _, _, number, _ in found.centres) == "Hi, you"
    assert found.centres[:, 3].tolist() == [0, 0, 0, -1, 1, 1, 1]
    assert found.centres[:, 1].tolist() == sorted(found.centres[:, 1])
    row, column = found.centres[:, :2].T
    assert (found.weights[row, column] == 2).all()
    assert (found.classes[row, column] == found.centres[:, 2]).all()
    assert found.middles.sum() == 7
    # the rim of characters is ignored; far away is background, and the page is white under red ink
    assert (found.weights == 0).any()
    assert found.weights[0, 0] == np.float32(0.15)
    assert {COLOURS[ink] for ink in np.unique(found.inks) if ink != NO_INK} == {"red"}
    assert {COLOURS[ground] for ground in np.unique(found.grounds)} == {"white"}


def test_characters_go_where_their_pixels_go():
    canvas = written("I", 40)
    for seed in range(12):
        image, _, glyphs = placed(canvas, (160, 64), np.random.default_rng(seed), turned=1.0)
        dark = np.argwhere(np.asarray(image)[..., 1] < 128)
        (left, top, right, bottom), (x, y) = glyphs.boxes[0], dark.mean(0)[::-1]
        assert left < x < right
        # the middle of a capital lies above that of the small letters
        assert abs((top + bottom) / 2 - y) < 8
        assert glyphs.lines[0, 0] < y < glyphs.lines[0, 1]


def test_wear_moves_nothing_and_none_leaves_all_as_it_was():
    image = written().image
    assert worn(image, np.random.default_rng(1), 0.0) is image
    for seed in range(12):
        seen = np.asarray(worn(image, np.random.default_rng(seed)))[..., 1].astype(float)
        alike = np.corrcoef(seen.ravel(), np.asarray(image)[..., 1].ravel().astype(float))[0, 1]
        assert alike > 0.5


def test_cut_off_and_tiny_characters_are_not_asked_for():
    canvas = Canvas((160, 64), (255, 255, 255))
    canvas.text(-30, 40, "abcdefgh", kins("train")[0][0], 24, (0, 0, 0))
    canvas.text(10, 60, "tiny", kins("train")[0][0], 5, (0, 0, 0))
    centres = targets_of(canvas.found(), np.asarray(canvas.ground)).centres
    assert "".join(CHARACTERS[number - 1] for number in centres[:, 2]) == "cdefgh"
    assert set(centres[:, 3]) == {0}


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((250, 250, 250), "white"), ((20, 20, 25), "black"), ((128, 130, 127), "grey"), ((214, 39, 40), "red"),
     ((255, 127, 14), "orange"), ((240, 220, 40), "yellow"), ((44, 160, 44), "green"), ((23, 190, 207), "turquoise"),
     ((31, 119, 180), "blue"), ((148, 60, 189), "purple"), ((227, 119, 194), "pink"), ((120, 70, 30), "brown")],
)  # fmt: skip
def test_colours_have_their_plain_names(rgb, name):
    assert COLOURS[colours_of(np.array(rgb, dtype=np.uint8).reshape(1, 1, 3))[0, 0]] == name


def test_families_and_words_held_out_are_never_trained_on():
    entries = json.loads(LISTED.read_text())
    assert len(entries) > 300
    by_split = {split: {kin_of(e["family"]) for e in entries if e["split"] == split} for split in ("train", "held_out")}
    assert all(entry["split"] == split_of(entry["family"]) and entry["licence"] for entry in entries)
    assert len(by_split["held_out"]) > 20
    assert not by_split["train"] & by_split["held_out"]
    assert not {face.path for faces in kins("train") for face in faces} & {
        face.path for faces in kins("held_out") for face in faces
    }
    assert not set(word_list("train")[1]) & set(word_list("held_out")[1])
    rng = np.random.default_rng(1)
    assert all(is_held_out(Words("held_out").word(rng)) for _ in range(50))
    assert not any(is_held_out(Words("train").word(rng)) for _ in range(50))


def test_all_that_is_written_can_be_read():
    rng, words = np.random.default_rng(3), Words()
    texts = [make(words, rng) for _ in range(40) for make in (Words.sentence, Words.piece, Words.phrase, Words.styled)]
    assert {character for text in texts for character in text} <= set(CLASS_OF)
    assert len(set(texts)) > 100


def test_characters_know_their_neighbours():
    canvas = Canvas((160, 32), (255, 255, 255))
    face = kins("train")[0][0]
    canvas.text(4, 24, "ab cd", face, 16, (0, 0, 0))
    canvas.text(100, 24, "e", face, 16, (0, 0, 0))
    found = targets_of(canvas.found(), np.asarray(canvas.ground))
    around = [found.around[:, row, column] for row, column, _, _ in found.centres]
    names = [[CLASS_OF[c] for c in "ab cd"][n] if 0 <= n < 5 else 0 for n in range(-1, 12)]
    for place in range(5):
        assert around[place].tolist() == [names[place], *names[place + 2 : place + 2 + FOLLOWING]]
    assert around[5].tolist() == [0] * (1 + FOLLOWING)
    assert (found.around[:, found.classes == 0] == UNKNOWN).all()
