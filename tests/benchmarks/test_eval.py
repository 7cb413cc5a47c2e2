"""Questions one at a time and in batches: both ways have figures and the same answers. No test asserts a time."""

import pytest

from casa.benchmarks.evaluation import bench_eval
from casa.benchmarks.settings import EvalSettings
from casa.errors import UserError


@pytest.mark.slow
def test_both_ways_have_figures():
    found = bench_eval(EvalSettings(pictures=3, questions=(1, 2), size=224, tokens=4, rounds=1, device="cpu"))
    record = found.record()
    assert record["bench"] == "eval"
    assert [(row["questions_per_picture"], row["questions"]) for row in record["rows"]] == [(1, 3), (2, 6)]
    for row in record["rows"]:
        assert row["alone_per_s"] > 0
        assert row["batched_per_s"] > 0
        assert row["same"] == 1
    assert "times faster" in found.table


def test_no_questions_are_refused():
    with pytest.raises(UserError, match="questions is"):
        EvalSettings(questions=())
