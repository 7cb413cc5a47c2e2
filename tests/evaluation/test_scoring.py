"""A run of questions: its file, what a stop leaves of it, and what it comes to."""

import json

import numpy as np
import pytest

from casa.data.record import BadRecord, Message, Text
from casa.errors import UserError
from casa.evaluation.metrics import Score
from casa.evaluation.questions import BadQuestion, Question
from casa.evaluation.scoring import RecordsFile, ask, by_metric, interval, score_questions, summarise

SCORERS = {name: by_metric(name) for name in ("exact", "wer")}
RUN = {"model": "m", "metrics": ["exact"]}


class Echo:
    """Answers with the question's number; of two at a time, later ones first. Ends after so many batches."""

    def __init__(self, most=None, damaged=3):
        self.most, self.damaged, self.asked = most, damaged, []

    def batches(self, questions):
        turned = questions[::-1]
        return [turned[at : at + 2] for at in range(0, len(turned), 2)]

    def answer(self, questions):
        if self.most is not None and len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append([one.index for one in questions])
        bad = BadRecord("unreadable-picture", "It is damaged.")
        return [bad if one.index == self.damaged else str(one.index) for one in questions]


def questions(count=7):
    yield BadQuestion("qa.jsonl:1", BadRecord("not-json", "The line is no JSON."))
    for index in range(count):
        asked = (Message("user", (Text(f"number {index}?"),)),)
        # the third record has two turns
        record, turn = (f"qa.jsonl:{index + 2}", 1) if index != 3 else ("qa.jsonl:4", 2)
        yield Question(index, record, turn, asked, (str(index % 4),))


def run(path=None, resume=False, most=None, damaged=3, **changes):
    answers = Echo(most, damaged)
    lines = score_questions(questions(), answers, SCORERS, RecordsFile(path, RUN | changes, resume))
    for line in lines:
        line.pop("seconds", None)
    return lines, answers


def test_lines_stand_in_the_order_of_the_data(tmp_path):
    lines, answers = run(tmp_path / "out.jsonl")
    assert answers.asked == [[6, 5], [4, 3], [2, 1], [0]]
    assert [line.get("index") for line in lines] == [0, 1, 2, 3, 4, 5, 6, None]
    assert lines[1] == {
        "index": 1, "record": "qa.jsonl:3", "question": "number 1?", "references": ["1"], "answer": "1",
        "scores": {"exact": 1.0, "wer": 0.0},
    }  # fmt: skip
    assert lines[3] == {
        "index": 3,
        "record": "qa.jsonl:4",
        "turn": 2,
        "error": "unreadable-picture",
        "why": "It is damaged.",
    }
    assert lines[-1] == {"record": "qa.jsonl:1", "error": "not-json", "why": "The line is no JSON."}
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in written] == lines
    assert run()[0] == lines, "the same without a file"


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_a_run_that_was_stopped_goes_on(tmp_path, most):
    whole, _ = run()
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, most=most)
    with path.open("ab") as file:
        file.write(b'{"index": 0, "record": "qa.js')  # what a stop may leave
    lines, answers = run(path, resume=True)
    assert lines == whole
    left = [[6, 5], [4, 3], [2, 1], [0]][most:]
    assert answers.asked == ([[4, 3]] if most > 1 else []) + left, "what is answered is not asked again"
    again, answers = run(path, resume=True)
    assert (again, answers.asked) == (whole, [[4, 3]])


@pytest.mark.parametrize("most", [2, None])
def test_what_was_bad_is_asked_again(tmp_path, most):
    """Its picture may have been put where it belongs."""
    path = tmp_path / "out.jsonl"
    if most is None:
        run(path)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(path, most=most)
    lines, answers = run(path, resume=True, damaged=None)
    assert [4, 3] in answers.asked
    assert lines == run(damaged=None)[0]
    assert len(path.read_text().splitlines()) == len(lines)


def test_a_batch_that_is_there_in_part_is_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    whole, _ = run(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[5:]))
    again, answers = run(path, resume=True)
    assert again == whole
    assert answers.asked == [[4, 3], [2, 1]], "4 is there, 3 was bad"


@pytest.mark.parametrize("most", [0, 2, None])
def test_batches_that_are_answered_elsewhere_come_to_the_same_file(tmp_path, most):
    """Whatever comes first; and a run that was stopped goes on there too."""
    whole, _ = run()
    path, there = tmp_path / "out.jsonl", Echo()

    def spread(batches):
        yield from (ask(there, None, batch) for batch in sorted(batches, key=lambda batch: batch[0].index))

    if most is not None:
        with pytest.raises(KeyboardInterrupt):
            run(path, most=most)
    lines = score_questions(questions(), Echo(0), SCORERS, RecordsFile(path, RUN, True), spread=spread)
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines] == whole
    left = [[0], [2, 1], [4, 3], [6, 5]][: 4 if most is None else 4 - most]
    assert there.asked == left + ([[4, 3]] if [4, 3] not in left else [])


def test_another_run_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    with pytest.raises(UserError, match="is there already; go on with it by resume=True"):
        run(path)
    with pytest.raises(UserError, match="of a run with another model, limit"):
        run(path, resume=True, model="other", limit=3)
    (tmp_path / "out.jsonl.run.json").unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        run(path, resume=True)
    with pytest.raises(UserError, match=r"folder of .* does not exist"):
        run(tmp_path / "none" / "out.jsonl")


def test_a_summary_by_hand():
    found = summarise(run()[0] and _with_seconds(run()[0]), SCORERS)
    # numbers 0, 1, 2 are right, 4, 5, 6 wrong, and 3 could not be asked
    assert found.metrics["exact"].score == 0.5
    assert found.metrics["wer"].score == 0.5
    assert (found.questions, dict(found.bad), found.seconds) == (6, {"unreadable-picture": 1, "not-json": 1}, 6)
    assert found.named == ("qa.jsonl:4: It is damaged.", "qa.jsonl:1: The line is no JSON.")
    scores = found.scores()
    assert list(scores) == ["exact", "exact_low", "exact_high", "wer", "wer_low", "wer_high", "n", "bad"]
    assert (scores["n"], scores["bad"]) == (6, 2)


def _with_seconds(lines):
    return [line if "error" in line else line | {"seconds": 1} for line in lines]


def test_intervals_are_those_of_the_mean():
    """95 % of a share of 0.5 among 400 are within 1.96 standard errors of 0.025; the seed decides."""
    scores = [Score(float(number % 2)) for number in range(400)]
    found = interval(scores, seed=1)
    assert found == interval(scores, seed=1) != interval(scores, seed=2)
    assert (found.score, found.n) == (0.5, 400)
    assert [found.low, found.high] == pytest.approx([0.451, 0.549], abs=0.006)


def test_rates_are_those_of_the_corpus():
    found = interval([Score(1, 1), Score(0, 9)])
    assert found.score == 0.1
    assert (found.low, found.high) == (0, 1)
    assert np.isnan(interval([Score(0, 0)]).score)


def test_nothing_that_can_be_asked():
    lines = score_questions(iter([]), Echo(), SCORERS, RecordsFile(None, RUN))
    assert summarise(lines, SCORERS).scores() == {"n": 0, "bad": 0}
