"""Streams: turns of fixed length beside insertion, and how many sessions keep up. No test asserts a time."""

import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from casa.benchmarks import sessions
from casa.benchmarks.sessions import (
    Load,
    bench_sessions,
    feed,
    keep_pace,
    sessions_summary,
    sessions_table,
    try_sessions,
)
from casa.benchmarks.turns import bench_turns, plot_turns, turns_summary, turns_table
from casa.errors import UserError
from casa.testing import PATIENCE, tiny_casa, tiny_processor


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
    ("most", "kept", "tried"),
    [(16, 11, [1, 2, 4, 8, 10, 11, 12, 16]), (16, 16, [1, 2, 4, 8, 16]), (5, 4, [1, 2, 4, 5]), (8, 0, [1])],
)
def test_the_bound_is_looked_for_between_what_is_sustained_and_what_is_not(model, monkeypatch, most, kept, tried):
    monkeypatch.setattr(sessions, "_load", lambda *given: Load(given[2], 1.0, 1.0, 0, (1.0, 1.0), given[2] <= kept, 0))
    loads = bench_sessions(model, tiny_processor(), most)
    assert [load.sessions for load in loads] == tried
    assert sessions_summary(loads, 2.0)["sustained"] == kept


def test_frames_come_by_the_clock_each_sessions_at_moments_of_its_own():
    now, heard = 0.0, []

    def sleep(seconds):
        nonlocal now
        now += seconds

    class Engine:
        def offer(self, name, picture):
            heard.append((now, name, picture.size))

    file = io.BytesIO()
    Image.new("RGB", (28, 56)).save(file, "JPEG")
    frame = file.getvalue()
    assert feed(Engine(), {"a": [frame] * 2, "b": [frame] * 2}, 2.0, lambda: now, sleep) == 0.75
    assert heard == [(0.0, "a", (28, 56)), (0.25, "b", (28, 56)), (0.5, "a", (28, 56)), (0.75, "b", (28, 56))]


def test_what_comes_by_the_clock_is_watched_or_counted_as_dropped(model, monkeypatch):
    tried = try_sessions(model, tiny_processor(), 2, fps=20.0, seconds=0.25)
    assert (tried.sessions, tried.frames) == (2, 10)
    assert tried.watched + tried.dropped == 10
    assert tried.watched >= 2
    # an engine that is not ready until all frames have come
    ready = threading.Event()
    ready.set()
    step = sessions.StreamingEngine.step

    def late(*given):
        ready.clear()
        try:
            return feed(*given)
        finally:
            ready.set()

    monkeypatch.setattr(sessions, "feed", late)
    monkeypatch.setattr(sessions.StreamingEngine, "step", lambda self: ready.wait(PATIENCE) and step(self))
    tried = try_sessions(model, tiny_processor(), 2, fps=20.0, seconds=0.25)
    assert (tried.watched, tried.dropped) == (2, 8)
    assert "8 of 10 frames dropped" in sessions_table([], 20.0, tried)
    assert sessions_summary([], 20.0, tried)["by_the_clock"]["dropped"] == 8


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
