"""The attention benchmark: it runs, says what it measured, and leaves the process as it was."""

import json

import pytest
import torch

from casa.benchmarks.attention import SHAPES, BenchShape, bench_attention, bench_record, bench_table
from casa.errors import UserError

SMALL = (BenchShape("even", 3, 4, (2, 2)), BenchShape("ragged", 3, 4, (1, 5)))


def test_rows_table_and_record():
    threads = torch.get_num_threads()
    rows = bench_attention(SMALL, impls=("reference", "sdpa"), repeats=2, seed=3, width=8)
    assert torch.get_num_threads() == threads
    assert [(row.shape, row.impl) for row in rows] == [
        (shape, impl) for shape in ("even", "ragged") for impl in ("dense mask", "reference", "sdpa")
    ]
    for row in rows:
        assert row.both_ms is not None
        assert row.forward_ms > 0
        assert row.both_ms > 0
    assert rows[0].both_ratio == 1.0
    record = json.loads(json.dumps(bench_record(rows, seed=3, repeats=2)))
    assert (record["versions"]["torch"], record["seed"], record["threads"]) == (torch.__version__, 3, threads)
    assert len(record["rows"]) == len(rows)
    table = bench_table(rows)
    assert all(word in table for word in ("even", "ragged", "sdpa", "dense mask", "1.0x"))


def test_shapes_are_those_of_the_promise():
    sizes = {(s.windows, s.image, s.text) for s in SHAPES}
    assert {(64, 64, (16, 16)), (16, 256, (64, 64)), (16, 256, (4, 90))} <= sizes
    layout = SHAPES[-1].layout(seed=1)
    assert layout.num_windows == 16
    assert layout == SHAPES[-1].layout(seed=1)
    assert layout != SHAPES[-1].layout(seed=2)


@pytest.mark.parametrize(("more", "words"), [({"impls": ("spda",)}, "known are"), ({"repeats": 0}, "at least 1")])
def test_refusals(more, words):
    with pytest.raises(UserError, match=words):
        bench_attention(SMALL, **more)
