"""Rows of a live stream: what falls behind shows. No test asserts a time."""

import gc
import io
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from casa.benchmarks import live
from casa.benchmarks.live import bench_live, bench_sessions, by_minute, feed, laps, live_summary, search, try_load
from casa.benchmarks.settings import LiveSettings, StreamSettings
from casa.errors import UserError
from casa.media import VideoWriter
from casa.memory import resident_bytes
from casa.streaming import FrameCaption, StreamingSession, WatchCounts, watch_live
from casa.testing import PATIENCE, tiny_casa, tiny_checkpoint, tiny_processor


def moments(seconds, lag):
    return [FrameCaption(second, "text", lag(second), 0.1, True) for second in seconds]


def rows(given, fps=2.0, seconds=180.0):
    return list(by_minute(given, fps, seconds, lambda: (1024, 2048)))


def test_each_minute_has_its_frames():
    found = rows(moments([k / 2 for k in range(360)], lambda second: 0.2))
    counts = [(row["minute"], row["frames"], row["watched"], row["dropped"]) for row in found]
    assert counts == [(m, 120, 120, 0) for m in range(3)]
    summary = live_summary(found, 2.0)
    assert summary["keeps_pace"]
    assert (summary["frames"], summary["dropped"], summary["accumulated_lag_ms"]) == (360, 0, 0.0)
    assert summary["growth_bytes"] == 0


def test_growth_is_over_the_second_minute():
    held = iter([(1, 500), (1, 700), (1, 710)])
    found = list(by_minute(moments([0.0, 60.0, 120.0], lambda second: 0.1), 2.0, 180.0, lambda: next(held)))
    assert live_summary(found, 2.0)["growth_bytes"] == 10
    assert live_summary(found[:2], 2.0)["growth_bytes"] is None


def test_lag_that_accumulates_shows():
    summary = live_summary(rows(moments([k / 2 for k in range(360)], lambda second: 0.1 + second / 100)), 2.0)
    assert summary["accumulated_lag_ms"] == pytest.approx(1200, abs=1)
    assert not summary["keeps_pace"]


def test_dropped_frames_show_also_where_nothing_was_watched():
    found = rows(moments([k / 2 for k in range(360) if k < 120 or k >= 250], lambda second: 0.1))
    assert [row["dropped"] for row in found] == [0, 120, 10]
    assert math.isnan(found[1]["median_lag_ms"])
    assert live_summary(found, 2.0)["dropped"] == 130
    assert not live_summary(found, 2.0)["keeps_pace"]


def test_captions_that_are_cut_show():
    cut = [FrameCaption(0.0, "te", 0.1, 0.1, False), *moments([0.5], lambda second: 0.1)]
    summary = live_summary(rows(cut, seconds=1.0), 2.0)
    assert (summary["cut"], summary["keeps_pace"]) == (1, False)


def test_the_last_minute_may_be_short():
    found = rows(moments([k / 2 for k in range(150)], lambda second: 0.1), seconds=75.0)
    assert [row["frames"] for row in found] == [120, 30]


def test_laps_go_on_in_time(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", (28, 28), 4) as video:
        for _ in range(4):
            video.write(np.zeros((28, 28, 3), np.uint8))
    assert [frame.time for frame in laps(tmp_path / "a.mp4", 2.0, 2.5, 1.0)] == [0.0, 0.5, 1.0, 1.5, 2.0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.slow
def test_a_short_stream_by_the_real_clock(checkpoint):
    found = bench_live(LiveSettings(checkpoint, minutes=0.02, size=224, fps=5.0))
    (row,) = found.figures["minutes"]
    assert row["frames"] == found.figures["frames"] == 6
    assert 1 <= row["watched"] <= 6
    assert row["max_lag_ms"] > 0
    assert row["cache_bytes"] > 0
    assert "keeps pace" in found.table


@pytest.mark.slow
def test_a_film_of_ones_own_is_watched_again_and_again(checkpoint, noise_film):
    found = bench_live(LiveSettings(checkpoint, minutes=0.03, video=str(noise_film(1)), fps=4.0))
    assert found.figures["frames"] == 8
    assert found.settings["video"] == "film.mp4"
    assert "size" not in found.settings


@pytest.mark.slow
@pytest.mark.skipif(not resident_bytes(), reason="this system does not tell a process's memory")
def test_frames_that_were_watched_leave_nothing(tmp_path):
    """A film of eight frames, opened again and again: 25 laps. Python's collector, which may come late, is off."""
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "a.mp4", (224, 224), 4) as video:
        for number in range(8):
            video.write(np.roll(noise, number, 0))
    session = StreamingSession(tiny_casa(dtype=torch.float32), tiny_processor(), max_text_tokens=96, max_new_tokens=1)
    turn = threading.Semaphore(1)

    def paced():
        for frame in laps(tmp_path / "a.mp4", 4.0, 50.0, 2.0):
            assert turn.acquire(timeout=PATIENCE)
            yield frame

    count, held = WatchCounts(), []
    gc.collect()
    gc.disable()
    try:
        for _ in watch_live(session, paced(), 0.001, counts=count):
            held.append(resident_bytes())
            turn.release()
    finally:
        gc.enable()
    assert (count.frames, count.dropped) == (200, 0)
    assert held[-1] - held[70] < 15e6


@pytest.mark.parametrize("settings", [{"minutes": 0.0}, {"fps": 0.0}, {"minutes": math.nan}])
def test_what_cannot_be(settings):
    with pytest.raises(UserError, match="above 0"):
        LiveSettings(**settings)


@pytest.mark.slow
def test_sessions_that_are_sustained_and_that_are_not(checkpoint):
    found = bench_sessions(StreamSettings(checkpoint, size=224, fps=2.0), 3, seconds=0.5)
    loads = found.figures["loads"]
    assert loads[0]["sessions"] == 1
    assert [load["frames"] for load in loads] == [load["sessions"] for load in loads]
    assert all(load["watched"] + load["dropped"] == load["frames"] for load in loads)
    slow = bench_sessions(StreamSettings(checkpoint, size=224, fps=1e6), 8, seconds=4e-6)
    assert [load["sessions"] for load in slow.figures["loads"]] == [1]
    assert slow.figures["sustained"] == 0
    assert "False" in slow.table


@pytest.mark.parametrize(
    ("most", "kept", "tried"),
    [(16, 11, [1, 2, 4, 8, 10, 11, 12, 16]), (16, 16, [1, 2, 4, 8, 16]), (5, 4, [1, 2, 4, 5]), (8, 0, [1])],
)
def test_the_bound_is_looked_for_between_what_is_sustained_and_what_is_not(most, kept, tried):
    loads = search(lambda count: {"sessions": count, "sustained": count <= kept}, most)
    assert [load["sessions"] for load in loads] == tried


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


class Slow:
    """An engine that is not ready until all frames have come."""

    def __init__(self, come):
        self.come, self.frames, self.lost = come, {}, {}

    def offer(self, name, picture):
        self.lost[name] = self.lost.get(name, -1) + 1
        self.frames[name] = picture
        return True

    def step(self):
        assert self.come.wait(PATIENCE)
        said = [SimpleNamespace(error=None) for _ in self.frames]
        self.frames.clear()
        return said

    @property
    def waiting(self):
        return len(self.frames)

    def dropped(self, name):
        return self.lost[name]

    def session(self, name):
        return SimpleNamespace(usage=SimpleNamespace(cache_bytes=100))


def test_what_comes_while_the_engine_is_not_ready_is_dropped(monkeypatch):
    come = threading.Event()

    def feed_and_tell(*given):
        try:
            return feed(*given)
        finally:
            come.set()

    monkeypatch.setattr(live, "feed", feed_and_tell)
    file = io.BytesIO()
    Image.new("RGB", (28, 56)).save(file, "JPEG")
    found = try_load(Slow(come), {"a": [file.getvalue()] * 5, "b": [file.getvalue()] * 5}, 20.0)
    assert (found["frames"], found["watched"], found["dropped"], found["sustained"]) == (10, 2, 8, False)
    assert found["bytes"] == 200
