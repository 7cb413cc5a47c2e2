"""What image tokens tell of a page's texts: words where they begin, those before them, and tags."""

import numpy as np
import pytest

from casa.vision.page_reading import TextRun
from casa.vision.page_words import (
    BEFORE,
    IDS,
    KINDS,
    NOTHING,
    SLOTS,
    TAG_IDS,
    TAGS,
    apart,
    known_words,
    plain_token,
    tags_of,
    words_of_page,
)

BREAK, END = 99, 98
NAMED = {"first": 71, "top": 72, "second": 73, "last": 74, "bottom": 75, "third": 76}


def words(text):
    """A text as whole words, each with the blank before it, as byte-level tokenizers have them: ids are lengths."""
    if text == "\n":
        return [(BREAK, (0, 1))]
    found, start = [], 0
    for word in text.split(" "):
        stop = start + len(word)
        if word:
            token = NAMED.get(word) or (80 + int(word) if word.isdigit() else len(word))
            found.append((token, (max(0, start - 1), stop)))
        start = stop + 1
    return found


def run_of(text, row=3.0, first=1, step=2):
    return TextRun(text, np.full(len(text), float(row)), first + step * np.arange(len(text), dtype=float))


def told(page, row, column):
    return page.ids[row, column, TAG_IDS:].tolist()


def kinds(tags):
    """Of each text, its tags by group: first of its line, head, left, number, top or bottom, above, below."""
    sizes = [most for slot in TAGS for most in slot]
    starts = np.cumsum((0, *sizes[:-1]))
    return [
        [[tag for tag in text[at : at + most] if tag != NOTHING] for at, most in zip(starts, sizes, strict=True)]
        for text in tags.tolist()
    ]


def test_tokens_stand_where_their_first_letter_does():
    page = words_of_page([run_of("seven is a number")], (2, 10), (2, 4), words)
    assert page.ids.shape == (2, 10, IDS)
    assert (page.ids[0] == NOTHING).all()
    # "seven" begins at column 1, a text; before "a" stand the first two; the break stands at the last letter
    assert told(page, 1, 0) == [NOTHING, NOTHING, BREAK, 5, NOTHING, NOTHING]
    assert told(page, 1, 3) == [NOTHING, BREAK, 5, 2, NOTHING, NOTHING]
    assert told(page, 1, 4) == [BREAK, 5, 2, 1, NOTHING, NOTHING]
    assert told(page, 1, 5) == [5, 2, 1, 6, NOTHING, NOTHING]
    assert told(page, 1, 8) == [2, 1, 6, BREAK, NOTHING, NOTHING]
    assert page.spots == [[(10, 0), (13, 0), (14, 0), (15, 0), (18, 0)]]


def test_more_than_a_token_holds_are_left_out_and_none_leaves_the_page():
    page = words_of_page([run_of("a b c d e f", step=1)], (2, 1), (2, 40), words, end=END)
    assert told(page, 1, 0) == [NOTHING, NOTHING, BREAK, 1, 1, 1]
    assert page.spots == [[(1, 0), (1, 1), (1, 2), *[(-1, -1)] * 4]]
    page = words_of_page([run_of("at the end", row=9.4, first=30)], (2, 4), (2, 4), words, end=END)
    assert told(page, 1, 3) == [NOTHING, NOTHING, BREAK, 2, 3, 3]


def test_a_text_ends_with_the_token_that_ends_an_answer():
    page = words_of_page([run_of("over")], (2, 4), (2, 4), words, end=END)
    assert told(page, 1, 1) == [NOTHING, BREAK, 4, END, NOTHING, NOTHING]


def test_a_value_is_asked_for_by_its_name_and_a_line_by_what_stands_above_it():
    runs = [
        run_of("amount", 1),
        run_of("overhead", 1, 40),
        run_of("tea", 4),
        run_of("two", 4, 20),
        run_of("four", 4, 40),
    ]
    tags = kinds(tags_of(runs, words))
    first, last = [[71, 81], [72]], [[73, 82], [74, 75]]
    # a line has a number; what is behind another text of its line is asked for by the line's first and by that one
    assert tags[0] == [[], [], [], *first, [], [3]]
    assert tags[1] == [[6], [], [], *first, [], [4]]
    assert tags[2] == [[], [], [], *last, [6], []]
    assert tags[3] == [[3], [], [], *last, [], []]
    assert tags[4] == [[3], [], [3], *last, [8], []]


def test_what_stands_in_a_table_is_asked_for_by_the_head_of_its_column():
    names = (("title",), ("of", "price", "quantity"), ("tea", "no", "a"), ("coffee", "yes", "b"), ("so", "total"))
    runs = [run_of(text, 1 + 3 * at, 1 + 40 * n) for at, row in enumerate(names) for n, text in enumerate(row)]
    found = {run.text: (tags[1], tags[5]) for run, tags in zip(runs, kinds(tags_of(runs, words)), strict=True)}
    assert found["no"] == ([5], [5])
    assert found["yes"] == ([5], [2])  # "price", and above it "no"
    assert found["b"] == ([8], [1])
    assert found["price"] == ([], [])
    assert found["total"] == ([], [3])  # not of the table


@pytest.mark.parametrize("off", [0.4, -0.6])
def test_texts_of_one_line_stand_a_little_higher_or_lower(off):
    tags = tags_of([run_of("name", 3), run_of("value", 3 + off, 30)], words)
    assert kinds(tags) == [[[]] * 7, [[4], *[[]] * 6]]


def test_names_are_told_without_marks_and_in_small_letters(monkeypatch):
    seen = []
    runs = [run_of("Total: 3", 1), run_of("7", 1, 60)]
    tags_of(runs, lambda text: seen.append(text) or words(text))
    assert {" Total: 3", " total: 3"} <= set(seen)
    assert kinds(tags_of([run_of("a - b", 1), run_of("7", 1, 60)], words))[1][0] == [1]


def test_tags_have_the_token_in_small_letters_behind_a_blank():
    known = {" tea": [5], " two words": [6, 7]}

    def encode(text):
        return [(token, (0, len(text))) for token in known[text]]

    assert plain_token(9, "Tea", encode) == plain_token(9, " tea ", encode) == 5
    assert plain_token(9, "TWO words", encode) == 9  # no one token says that


def test_a_name_does_not_push_out_another():
    many = " ".join("abcdefghijklmn"[:n] for n in range(1, 15))
    runs = [run_of(many, 1, 1, 1), run_of("seventeen", 1, 125), run_of("value", 1, 160)]
    assert kinds(tags_of(runs, words))[2][:3] == [[1, 2, 3, 4, 5, 6, 7, 8], [], [9]]


def test_a_line_alone_has_no_number_and_every_token_of_a_text_its_tags():
    assert (tags_of([run_of("alone")], words) == NOTHING).all()
    page = words_of_page([run_of("one", 1), run_of("two three", 4)], (4, 10), (2, 4), words)
    starts = [spot for spot, _ in page.spots[1][:2]]
    tags = [kinds(page.ids.reshape(-1, IDS)[spot : spot + 1]) for spot in starts]
    assert tags[0] == tags[1] == [[[], [], [], [73, 82], [74, 75], [3], []]]
    assert len(SLOTS) == len(TAGS) + BEFORE + 3


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Tea .......... 4.10", ["Tea", "4.10"]),
        ("______ 7", ["7"]),
        ("2 x Green tea", ["2", "Green tea"]),
        ("12x Tea", ["12", "Tea"]),
        ("Tea (3)", ["Tea", "3"]),
        ("Tea (green) 3", ["Tea (green) 3"]),
        ("wait ... what", ["wait ... what"]),
        ("3 x 4", ["3 x 4"]),
        ("ax box", ["ax box"]),
        ("1234x Tea", ["1234x Tea"]),
        ("Tea (12)", ["Tea", "12"]),
        ("Tea ..... (3)", ["Tea", "3"]),
        ("Report (2024)", ["Report (2024)"]),
        ("(3)", ["(3)"]),
        ("f(3)", ["f(3)"]),
        ("1 xylophone", ["1 xylophone"]),
    ],
)
def test_what_stands_beside_dots_or_a_number_of_things_is_a_text_of_its_own(text, pieces):
    whole = run_of(text, first=5)
    found = apart([whole])
    assert [run.text for run in found] == pieces
    for run in found:
        at = text.index(run.text)
        assert run.columns.tolist() == whole.columns[at : at + len(run.text)].tolist()
        assert len(run.rows) == len(run.text)


def test_names_and_values_in_turns_belong_together_and_a_number_of_things_to_the_things():
    runs = [run_of(text, 1, first) for text, first in (("name", 1), ("b", 30), ("street", 60), ("18", 90))]
    tags = kinds(tags_of(runs, words))
    assert [each[0] for each in tags] == [[], [4], [4], [6]]
    runs = [run_of(text, 1, first) for text, first in (("name", 1), ("row 1", 30), ("x1", 60), ("18", 90))]
    assert [each[0] for each in kinds(tags_of(runs, words))] == [[], [4], [4], [4]], "a table's row"
    runs = [run_of(text, 1, first) for text, first in (("2", 1), ("coffee", 10), ("4.10", 90))]
    assert [each[0] for each in kinds(tags_of(runs, words))] == [[6], [], [6]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("$4.10", " price cost much"),
        ("1.927,20 €", " price cost much"),
        ("12:29 AM", " time"),
        ("18 August 1994", " date"),
        ("1994-08-18", " date"),
        ("August 18, 1994", " date"),
        ("2 Mars bars", ""),
        ("2024-12345", ""),
        ("18/08/1994", " date"),
        ("7", " many quantity"),
        ("7%", " percent"),
        ("+49 398 749 167", " phone"),
        ("2260", ""),
        ("the change was 7%", ""),
    ],
)
def test_a_text_without_a_columns_head_is_asked_for_as_what_it_is(text, kind):
    seen = []
    tags = kinds(tags_of([run_of("name", 1), run_of(text, 1, 60)], lambda text: seen.append(text) or words(text)))
    assert [one for one in seen if one in KINDS.values()] == ([kind] if kind else [])
    assert tags[1][1] == [len(word) for word in kind.split()]
    names = (("of", "price", "quantity"), ("tea", text, "a"), ("coffee", "yes", "b"))
    runs = [run_of(each, 1 + 3 * at, 1 + 60 * n) for at, row in enumerate(names) for n, each in enumerate(row)]
    assert kinds(tags_of(runs, words))[4][1] == [5], "the head of its column goes before"


def test_what_a_column_is_made_of_is_no_head_of_it():
    rows = (("2", "coffee", "$4.10"), ("3", "tea", "$6.30"))
    runs = [run_of(text, 1 + 3 * at, 1 + 60 * n) for at, row in enumerate(rows) for n, text in enumerate(row)]
    tags = kinds(tags_of(runs, words))
    assert [each[1] for each in tags[3:]] == [[4, 8], [6], [5, 4, 4]]
    assert [each[0] for each in tags[3:]] == [[3], [], [3]]


def test_a_misread_name_is_told_as_the_word_that_it_nearly_is():
    known = known_words(["Ġamount", "ĠTotal", "▁receipt", "Ġa1b2", "Ġtea", "amounts", "Ġat"])
    assert known == {"amount", "total", "receipt", "tea"}
    said = []

    def encode(text):
        said.append(text)
        return words(text)

    tags_of([run_of("Armount", 1), run_of("7", 1, 60)], encode, known)
    assert " amount" in said
    for right in ("Total", "Teas", "Recxipxt", "te"):
        said.clear()
        tags_of([run_of(right, 1), run_of("7", 1, 60)], encode, known)
        meant = {text.strip() for text in said if text.strip() in known}
        assert meant == {"Total": {"total"}, "Teas": {"tea"}}.get(right, set())
