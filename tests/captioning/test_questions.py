"""Questions and their seconds."""

import pytest

from casa.captioning import Question, parse_question
from casa.captioning.questions import Questions
from casa.errors import UserError


def test_as_they_are_written():
    assert parse_question("12.5=What is a = b?") == Question(12.5, "What is a = b?")
    assert parse_question("0= Who? ") == Question(0.0, "Who?")


@pytest.mark.parametrize("written", ["", "12", "=Who?", "x=Who?", "-1=Who?", "nan=Who?", "inf=Who?", "12= "])
def test_what_is_none(written):
    with pytest.raises(UserError, match="write it as"):
        parse_question(written)


def test_each_is_due_once_in_order_whatever_the_order_given():
    questions = Questions([Question(2, "b"), Question(0, "a"), Question(2, "c"), Question(99, "d")])
    assert [q.text for q in questions.due(0.0)] == ["a"]
    assert questions.due(1.5) == []
    assert [q.text for q in questions.due(2.5)] == ["b", "c"]
    assert questions.asked == 3
    assert [q.text for q in Questions([Question(2, "b"), Question(0, "a")], asked=1).due(9)] == ["b"]
