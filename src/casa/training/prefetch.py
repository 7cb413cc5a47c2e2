"""Batches made ahead of time by other processes, in order: drawing pages must not slow training down.

Batch number n depends on n alone (its maker seeds itself with it), so a run that is resumed, or that has another
number of workers, sees the same batches.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from threading import Thread
from typing import Any

_AHEAD = 8  # batches asked for beyond the one in use, per worker


def prefetch(make: Callable[[int], Any], start: int, stop: int, workers: int) -> Iterator[Any]:
    """make(start), ..., make(stop - 1), in order. workers: processes; 0 makes each batch when it is asked for.

    `make` must be picklable if there are workers (functions and dataclasses at module level are).
    """
    if workers == 0:
        yield from (make(number) for number in range(start, stop))
        return
    # spawned, not forked: a fork of a process whose threads are computing can hang
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_modest)
    waiting: deque[Future[Any]] = deque()
    try:
        for number in range(start, stop):
            while len(waiting) < _AHEAD * workers and number + len(waiting) < stop:
                waiting.append(executor.submit(make, number + len(waiting)))
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _modest() -> None:
    # a maker with threads of its own would take the cores from the training
    import torch

    torch.set_num_threads(1)
    Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    # a pool's processes wait for work for ever if the one that gives it is killed
    parent.join()
    os._exit(1)
