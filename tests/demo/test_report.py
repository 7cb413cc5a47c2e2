"""How captions are marked and figures told."""

from pathlib import Path

import pytest

from casa.analysis.streaming_cost import Cost, CostRow
from casa.demo.report import DemoReport, FrameAnswer, line, mark
from casa.demo.run import questions_for
from casa.streaming import Usage


def row(seconds, size, rival=True):
    cost = Cost(seconds, Usage(3, 6, size, size, 0, 0))
    return CostRow("", 1, cost, Cost(2 * seconds, Usage(3, 6, 3 * size, 3 * size, 0, 0)) if rival else None)


def report(**changes):
    values = {
        "times": (0.0, 0.5, 1.0, 1.5),
        "said": ("", "71", "", "9"),
        "truth": ("", "71", "8", ""),
        "rows": tuple(row(0.1, 2048) for _ in range(4)),
        "asked_at": 0.5,
        "answers": (FrameAnswer("Read line 1.", "71", "71"), FrameAnswer("How many?", "", "2")),
        "files": (),
        "seconds": 3.0,
    }
    return DemoReport(**(values | changes))


@pytest.mark.parametrize(
    ("said", "truth", "wanted"), [("7", "7", "right"), ("", "7", "missed"), ("1", "7", "wrong"), ("7", "", "extra")]
)
def test_marks(said, truth, wanted):
    assert mark(said, truth) == wanted
    assert line(1.5, said, truth).split()[-1] == wanted


def test_silence_has_no_line():
    assert line(1.0, "", "") is None
    assert line(1.0, "", None) is None
    assert line(1.0, "hello", None) == "   1.0 s  hello"


def test_figures():
    told = "\n".join(report().lines())
    assert "50.0 % of 2 numbers" in told  # 8 was misread as 9
    assert "10.0 frames a second" in told
    assert "2 KiB after the first frame" in told
    assert "6 KiB after frame 4; 200 ms" in told
    assert "Read line 1.  71   (right)" in told
    assert "(nothing)   (missed)" in told


def test_without_truth_or_rival_those_lines_are_left_out(tmp_path):
    (tmp_path / "a.srt").write_bytes(b"12345")
    rows = tuple(row(0.1, 2048, rival=False) for _ in range(4))
    told = "\n".join(report(truth=None, rows=rows, files=(Path(tmp_path / "a.srt"),)).lines())
    assert "error rate" not in told
    assert "insertion" not in told
    assert "a.srt  5 B" in told
    assert report(truth=("", "", "", "")).wer is None


def test_questions_have_their_truth():
    assert dict(questions_for("4071")) == {
        "Read line 1.": "4071",
        "How many digits are in line 1?": "4",
        "What is digit 4 of line 1?": "1",
    }
    assert {truth for _, truth in questions_for(None)} == {None}
