"""Pages: sizes, layout and answers."""

import numpy as np
import pytest

from casa.evaluation.example import CELL
from casa.evaluation.handwriting import FIRST_HELD_OUT
from casa.evaluation.pages import MIN_LINE_PITCH, MIN_PITCH, page

SEEDS = range(51)


@pytest.fixture(scope="module")
def examples():
    return [page(seed, split, turns=8) for seed in SEEDS for split in ("train", "held_out")]


@pytest.mark.slow
def test_sizes(examples):
    for example in examples:
        assert example.image.mode == "RGB"
        for side in example.image.size:
            assert side % CELL == 0
            assert 112 <= side <= 672


def test_layout_keeps_its_distances(examples):
    for example in examples:
        glyphs = example.meta["glyphs"]
        for a in glyphs:
            left, top, right, bottom = a.box
            assert left >= 0
            assert top >= 0
            assert right <= example.image.width
            assert bottom <= example.image.height
            for b in glyphs:
                (ax, ay), (bx, by) = a.centre, b.centre
                if a.line == b.line and b.column == a.column + 1:
                    assert bx - ax >= MIN_PITCH - 0.01
                # a page's common tilt is at most 1.5 degrees; digits at the same x show the lines' distance
                if b.line == a.line + 1 and abs(ax - bx) < MIN_PITCH:
                    assert by - ay >= MIN_LINE_PITCH - 2
            cells = [tuple(int(v // CELL) for v in g.centre) for g in glyphs]
            assert len(set(cells)) == len(cells)


def test_lines_and_digits_span_one_to_six(examples):
    lines = [example.meta["lines"] for example in examples]
    assert {len(page_lines) for page_lines in lines} == set(range(1, 7))
    assert {len(line) for page_lines in lines for line in page_lines} == set(range(1, 7))


def test_scans_are_of_the_split(examples):
    for train, held_out in zip(examples[::2], examples[1::2], strict=True):
        assert all(glyph.scan < FIRST_HELD_OUT for glyph in train.meta["glyphs"])
        assert all(glyph.scan >= FIRST_HELD_OUT for glyph in held_out.meta["glyphs"])


def test_answers_follow_from_the_lines(examples):
    seen = set()
    for example in examples:
        lines = example.meta["lines"]
        assert len(example.turns) == 8
        for turn in example.turns:
            seen.add(turn.kind)
            numbers = [
                int(word) for word in turn.question.replace("?", " ").replace(".", " ").split() if word.isdigit()
            ]
            if turn.kind == "line":
                assert turn.question == f"Read line {numbers[0]}."
                assert turn.answer == lines[numbers[0] - 1]
            elif turn.kind == "digit":
                assert turn.question == f"What is digit {numbers[0]} of line {numbers[1]}?"
                assert turn.answer == lines[numbers[1] - 1][numbers[0] - 1]
            elif turn.kind == "lines":
                assert turn.answer == str(len(lines))
            elif turn.kind == "length":
                assert turn.answer == str(len(lines[numbers[0] - 1]))
            else:
                assert (turn.question, turn.answer) == ("Read the last line.", lines[-1])
    assert seen == {"line", "digit", "lines", "length", "last_line"}


def test_ink_is_where_the_boxes_are():
    for seed in range(10):
        example = page(seed, "held_out")
        grey = np.asarray(example.image.convert("L")).astype(float)
        paper = np.median(grey)
        for glyph in example.meta["glyphs"]:
            left, top, right, bottom = (int(v) for v in glyph.box)
            # some strokes are clearly darker than the paper
            assert np.percentile(grey[top:bottom, left:right], 10) < paper - 50


def test_same_seed_same_page_other_seed_other_page():
    a, b, other = page(7, "train"), page(7, "train"), page(8, "train")
    assert a.image.tobytes() == b.image.tobytes()
    assert a.turns == b.turns
    assert a.meta == b.meta
    assert other.meta != a.meta


def test_the_same_seed_differs_between_splits():
    assert page(7, "train").meta["lines"] != page(7, "held_out").meta["lines"]


def test_a_generator_gives_one_page_after_another():
    rng = np.random.default_rng(0)
    assert page(rng).meta["lines"] != page(rng).meta["lines"]


def test_chosen_turns_and_sizes():
    example = page(0, "train", turns=("digit", "line"), sizes=[(112, 224)])
    assert [turn.kind for turn in example.turns] == ["digit", "line"]
    assert example.image.size == (224, 112)


def test_wrong_wishes_are_refused():
    with pytest.raises(ValueError, match="'wrod' is no kind of page question"):
        page(0, turns=("wrod",))
    with pytest.raises(ValueError, match="multiples of 28"):
        page(0, sizes=[(120, 112)])
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        page(0, "validation")  # type: ignore[arg-type]
