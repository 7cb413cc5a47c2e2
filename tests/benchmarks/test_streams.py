"""Streams: turns of fixed length beside insertion, and how many sessions keep up. No test asserts a time."""

import itertools

import numpy as np
import pytest

from casa.benchmarks.sessions import bench_sessions, sessions_summary, sessions_table
from casa.benchmarks.turns import PeakMemory, bench_turns, plot_turns, turns_summary, turns_table
from casa.errors import UserError
from casa.testing import tiny_casa, tiny_processor


def frames():
    generator = np.random.default_rng(0)
    return (generator.integers(0, 255, (56, 84, 3), dtype=np.uint8) for _ in itertools.count())


@pytest.fixture(scope="module")
def model():
    return tiny_casa()


@pytest.fixture(scope="module")
def turns(model):
    return bench_turns(model, tiny_processor(), frames(), turns=12, tokens=3)


def test_both_take_the_same_turns_and_only_insertion_grows_by_its_images(turns):
    assert {name: len(rows) for name, rows in turns.items()} == {"casa": 12, "insertion": 12}
    # a delimiter, and two of three tokens fed; six image tokens a frame
    grown = {name: rows[-1].cache_tokens - rows[-2].cache_tokens for name, rows in turns.items()}
    assert grown == {"casa": 3, "insertion": 9}
    assert turns["casa"][-1].cache_tokens == 12 * 3 + 6


def test_summary_table_and_plot_tell_them(turns, tmp_path):
    summary = turns_summary(turns)
    assert summary["insertion"]["cache_tokens"] == 12 * 9
    assert len(summary["casa"]["first_token_ms"]) == 2
    assert turns_table(summary).count("\n") == 2
    plot_turns(turns, tmp_path / "turns.png")
    assert (tmp_path / "turns.png").read_bytes().startswith(b"\x89PNG")


def test_sessions_double_until_one_is_too_slow(model):
    loads = bench_sessions(model, tiny_processor(), most=3, fps=0.001, size=224, seconds=1000, max_text_tokens=None)
    assert [load.sessions for load in loads] == [1, 2, 3]
    assert all(load.sustained for load in loads)
    assert loads[2].bytes > loads[0].bytes
    slow = bench_sessions(model, tiny_processor(), most=8, fps=1e6, size=224, seconds=1e-6, max_text_tokens=None)
    assert [load.sessions for load in slow] == [1]
    assert sessions_summary(slow, 1e6)["sustained"] == 0
    assert "too slow" in sessions_table(slow, 1e6)


def test_memory_is_watched():
    with PeakMemory() as memory:
        kept = np.ones(30_000_000)
        kept += 1
        import time

        time.sleep(0.1)
    assert memory.bytes > 100e6


@pytest.mark.parametrize("settings", [{"turns": 5}, {"tokens": 1}])
def test_too_little_to_measure_is_refused(model, settings):
    with pytest.raises(UserError, match="give at least"):
        bench_turns(model, tiny_processor(), frames(), **{"turns": 10, "tokens": 2} | settings)
