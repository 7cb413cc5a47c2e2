"""Streams: turns of fixed length beside insertion, and how many sessions keep up. No test asserts a time."""

import itertools

import numpy as np
import pytest

from casa.benchmarks.sessions import bench_sessions, keep_pace, sessions_summary, sessions_table
from casa.benchmarks.turns import bench_turns, plot_turns, turns_summary, turns_table
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


@pytest.mark.parametrize(
    ("steps", "dropped", "lags"),
    [
        ([0.1, 0.4, 0.5, 0.1], 0, [100, 400, 500, 100]),
        # late by less than a frame: the next one waits, and nothing is lost
        ([0.1, 0.9, 0.1, 0.1], 0, [100, 900, 500, 100]),
        # a step of over two frames: the one between is replaced by the newest
        ([0.1, 1.2, 0.1], 1, [100, 1200, 300]),
        # always too slow: every second frame; the last one came while a step lasted, and is not lost
        ([1.0, 1.0, 1.0], 1, [1000, 1000, 1500]),
    ],
)
def test_frames_that_come_while_a_step_lasts_are_late_or_dropped(steps, dropped, lags):
    left = iter(steps)
    pace = keep_pace(lambda: next(left), 4, fps=2.0)
    assert pace.dropped == dropped
    assert pace.lags_ms == pytest.approx(lags)
    assert next(left, None) is None


@pytest.mark.parametrize("settings", [{"turns": 5}, {"tokens": 1}])
def test_too_little_to_measure_is_refused(model, settings):
    with pytest.raises(UserError, match="give at least"):
        bench_turns(model, tiny_processor(), frames(), **{"turns": 10, "tokens": 2} | settings)
