"""Reading ahead in a thread: bounded, newest first where asked, and gone when closed."""

import threading

import numpy as np
import pytest

from casa.errors import UserError
from casa.media.ahead import Ahead
from casa.media.pictures_source import PictureSource

PICTURE = np.zeros((2, 2, 3), np.uint8)


class Tap:
    """An iterator of pictures that gives one for each `turn`; says when it is asked for the next."""

    def __init__(self, count):
        self.left, self.turns, self.asked = count, threading.Semaphore(0), threading.Semaphore(0)

    def __iter__(self):
        return self

    def __next__(self):
        self.asked.release()
        assert self.turns.acquire(timeout=10)
        if not self.left:
            raise StopIteration
        self.left -= 1
        return PICTURE

    def run(self, times):
        """Gives so many, and waits until they are taken in."""
        for _ in range(times):
            self.turns.release()
            assert self.asked.acquire(timeout=10)


def test_the_newest_wins_and_the_rest_are_counted():
    tap = Tap(10)
    with Ahead(PictureSource(tap, fps=2), size=1) as source:
        assert tap.asked.acquire(timeout=10)
        tap.run(5)
        assert next(source).number == 4
        assert source.counts.dropped == 4
        tap.run(2)
        assert next(source).number == 6
        tap.run(3)
        tap.turns.release()  # the end
        assert [f.number for f in source] == [9]
    assert source.counts.dropped == 7
    assert not source._thread.is_alive()


def test_room_for_more():
    tap = Tap(10)
    with Ahead(PictureSource(tap), size=3) as source:
        assert tap.asked.acquire(timeout=10)
        tap.run(5)
        assert [next(source).number for _ in range(3)] == [2, 3, 4]
        tap.turns.release()
        source.close()


def test_without_dropping_the_source_waits():
    made = []

    def pictures():
        for k in range(20):
            made.append(k)
            yield PICTURE

    with Ahead(PictureSource(pictures()), size=2, drop="none") as source:
        assert next(source).number == 0
        assert len(made) <= 4  # the one taken, two that wait, one in hand
        assert [f.number for f in source] == list(range(1, 20))
    assert source.counts.dropped == 0


def test_an_error_comes_after_the_frames_before_it():
    def pictures():
        yield PICTURE
        raise OSError("unplugged")

    with Ahead(PictureSource(pictures()), size=4) as source:
        assert next(source).number == 0
        with pytest.raises(OSError, match="unplugged"):
            next(source)
        assert list(source) == []


def test_closing_wakes_whoever_waits_and_lets_go_of_the_source():
    tap = Tap(10)
    source = Ahead(PictureSource(tap))
    taken = []
    waiter = threading.Thread(target=lambda: taken.extend(source))
    waiter.start()
    assert tap.asked.acquire(timeout=10)
    tap.turns.release(2)
    source.close()
    waiter.join(10)
    source._thread.join(10)
    assert not waiter.is_alive()
    assert not source._thread.is_alive()
    source.close()
    assert list(source) == []


def test_nothing_runs_before_it_is_used():
    source = Ahead(PictureSource([PICTURE]))
    assert not source._thread.is_alive()
    source.close()
    assert list(source) == []


def test_it_says_what_its_source_says():
    inner = PictureSource([PICTURE], live=True)
    source = Ahead(inner)
    assert (source.describe, source.is_live, source.counts) == (inner.describe, True, inner.counts)


@pytest.mark.parametrize("bad", [{"size": 0}, {"drop": "newest"}])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(UserError, match="give"):
        Ahead(PictureSource([PICTURE]), **bad)
