"""Batches come in order, whoever makes them."""

import multiprocessing
import os
import time
from threading import Thread

import pytest

from casa.testing import PATIENCE
from casa.training import prefetch as prefetching
from casa.training.prefetch import prefetch


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def fails_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


@pytest.mark.parametrize("workers", [0, 1])
def test_in_order(workers: int) -> None:
    # importlib mode hides this module from a spawned process, so workers are given a builtin
    if workers == 0:
        assert [value for value, _ in prefetch(square, 2, 6, 0)] == [4, 9, 16, 25]
    else:
        assert list(prefetch(abs, -3, 20, workers)) == [abs(n) for n in range(-3, 20)]


def test_nothing_to_do() -> None:
    assert list(prefetch(square, 5, 5, 0)) == []


def test_an_error_reaches_the_caller() -> None:
    got = prefetch(fails_at_three, 0, 9, 0)
    assert [next(got), next(got), next(got)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(got)


def test_a_worker_ends_with_its_parent(monkeypatch) -> None:
    """A real process is the parent; this one stands for the worker."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    parent = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    parent.start()
    watching = Thread(target=prefetching._end_with, args=(parent,))
    watching.start()
    assert ended == []
    parent.kill()
    watching.join(timeout=PATIENCE)
    assert ended == [1]
