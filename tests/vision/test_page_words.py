"""What image tokens tell of a page's texts: words where they begin, those before them, and tags."""

import numpy as np
import pytest

from casa.vision.page_reading import TextRun
from casa.vision.page_words import BEFORE, IDS, NOTHING, SLOTS, TAG_IDS, TAGS, plain_token, tags_of, words_of_page

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
    assert told(page, 1, 0) == [NOTHING, BREAK, 5, NOTHING, NOTHING]
    assert told(page, 1, 3) == [BREAK, 5, 2, NOTHING, NOTHING]
    assert told(page, 1, 4) == [5, 2, 1, NOTHING, NOTHING]
    assert told(page, 1, 5) == [2, 1, 6, NOTHING, NOTHING]
    assert told(page, 1, 8) == [1, 6, BREAK, NOTHING, NOTHING]
    assert page.spots == [[(10, 0), (13, 0), (14, 0), (15, 0), (18, 0)]]


def test_more_than_a_token_holds_are_left_out_and_none_leaves_the_page():
    page = words_of_page([run_of("a b c d e f", step=1)], (2, 1), (2, 40), words, end=END)
    assert told(page, 1, 0) == [NOTHING, BREAK, 1, 1, 1]
    assert page.spots == [[(1, 0), (1, 1), (1, 2), *[(-1, -1)] * 4]]
    page = words_of_page([run_of("at the end", row=9.4, first=30)], (2, 4), (2, 4), words, end=END)
    assert told(page, 1, 3) == [NOTHING, BREAK, 2, 3, 3]


def test_a_text_ends_with_the_token_that_ends_an_answer():
    page = words_of_page([run_of("over")], (2, 4), (2, 4), words, end=END)
    assert told(page, 1, 1) == [BREAK, 4, END, NOTHING, NOTHING]


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


@pytest.mark.parametrize("apart", [0.4, -0.6])
def test_texts_of_one_line_stand_a_little_higher_or_lower(apart):
    tags = tags_of([run_of("name", 3), run_of("value", 3 + apart, 30)], words)
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
