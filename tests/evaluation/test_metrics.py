"""Exact match and word error rate, edges included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casa.evaluation.metrics import edit_distance, exact_match, normalise, word_error_rate, words

ITEMS = st.lists(st.sampled_from("abc"), max_size=6)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Top  Left. ", "top left"),
        ("4071", "4071"),
        ("", ""),
        (".", ""),
        ("４０", "40"),
        ("a\nblue star!", "a blue star"),
    ],
)
def test_normalise(text, wanted):
    assert normalise(text) == wanted


def test_exact_match_counts_whole_answers():
    assert exact_match(["4071", "Red.", "70"], ["4071", "red", "7"]) == pytest.approx(2 / 3)


def test_leading_zeros_count():
    assert exact_match(["71"], ["071"]) == 0


def test_exact_match_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no answers"):
        exact_match([], [])
    with pytest.raises(ValueError, match="1 answers cannot be compared with 2"):
        exact_match(["a"], ["a", "b"])


def test_empty_captions_hold_no_words():
    assert words(["", "40 71", " ", "3."]) == ["40", "71", "3"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("abc", "abc", 0),
        ("abc", "axc", 1),
        ("abc", "bc", 1),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(reference, hypothesis, edits):
    assert edit_distance(list(reference), list(hypothesis)) == edits


@given(ITEMS, ITEMS, ITEMS)
def test_edit_distance_is_a_distance(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_word_error_rate_is_taken_over_the_corpus():
    # 1 edit in 1 word and 0 in 3: 1/4, not the mean 1/2 of the two streams
    assert word_error_rate([(["", "7"], ["8", ""]), (["1", "2", "3"], ["1", "2", "3"])]) == 0.25


def test_saying_a_number_late_costs_nothing_and_twice_costs_one():
    truth = ["", "40", "", "71"]
    assert word_error_rate([(truth, ["", "", "40", "71"])]) == 0
    assert word_error_rate([(truth, ["", "40", "40", "71"])]) == 0.5


def test_silence_is_one_and_chatter_more():
    assert word_error_rate([(["1", "2"], ["", ""])]) == 1
    assert word_error_rate([(["1"], ["2 3 4"])]) == 3


def test_no_true_words_is_refused():
    with pytest.raises(ValueError, match="no word"):
        word_error_rate([(["", ""], ["1", ""])])
