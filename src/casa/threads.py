"""As many threads as other processes leave cores free for (docs/serving.md, "Beside other work").

share_cores()    by the `casa` program, when it starts; a program of one's own may do the same
settle()         on the thread that computes, between two pieces of work; does nothing unless the cores are shared
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

CHOSEN = ("OMP_", "GOMP_", "KMP_", "MKL_")  # variables by which users choose for themselves
STAT = "/proc/stat"
EVERY = 0.5  # s between two looks at the cores
# a share of a core that others may use before a thread is taken away, and one at which it comes back, twice in a row
LOST, CALM = 0.4, 0.15


class Sharing:
    """Looks at the `cores` that this process may use now and then.

    `used` are the seconds that these were in use, `own` those of this process, both so far and over all cores.
    `backend` is torch if left out.
    """

    def __init__(
        self,
        cores: int,
        used: Callable[[], float],
        own: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
        backend: Any = None,
    ) -> None:
        self._cores, self._used, self._own, self._clock, self._backend = cores, used, own, clock, backend
        self._most: int | None = None
        self._count = self._calm = 0
        self._lock = threading.Lock()
        self._seen = self._now()
        self.others = 0.0  # cores that other processes used, from one look to the next

    def settle(self) -> None:
        """Gives the work of the calling thread as many threads as there are cores free."""
        if (backend := self._backend) is None:
            import torch as backend
        with self._lock:
            if self._most is None:
                self._most = self._count = int(backend.get_num_threads())
            if self._clock() - self._seen[0] >= EVERY:
                self._look(self._most)
            count = self._count
        if backend.get_num_threads() != count:
            backend.set_num_threads(count)

    def _look(self, most: int) -> None:
        before, self._seen = self._seen, self._now()
        seconds, used, own = (now - then for now, then in zip(self._seen, before, strict=True))
        self.others = max(0.0, (used - own) / seconds)
        free = self._cores - self.others
        fewer, more = max(1, int(free + LOST)), min(most, int(free + CALM))
        self._calm = self._calm + 1 if more > self._count else 0
        if fewer < self._count:
            self._count = fewer
        elif self._calm == 2:
            self._count, self._calm = more, 0

    def _now(self) -> tuple[float, float, float]:
        return self._clock(), self._used(), self._own()


_sharing: Sharing | None = None


def share_cores(environment: Mapping[str, str] = os.environ) -> Sharing | None:
    """From now on `settle` keeps to the cores that are free.

    Nothing changes, and None is returned, where the user has chosen threads by the environment, or the system does not
    tell what its cores do.
    """
    global _sharing
    if any(name.startswith(CHOSEN) for name in environment):
        return None
    try:
        cores = os.sched_getaffinity(0)
        used_seconds(cores)
    except (AttributeError, OSError, ValueError):
        return None
    _sharing = Sharing(len(cores), lambda: used_seconds(cores))
    return _sharing


def settle() -> None:
    """As `Sharing.settle`, if this program shares its cores."""
    if _sharing is not None:
        _sharing.settle()


def used_seconds(cores: set[int]) -> float:
    """Seconds that these cores have been in use since the machine started. Raises OSError or ValueError if unknown."""
    names, ticks = {f"cpu{core}" for core in cores}, 0
    with open(STAT, encoding="ascii") as file:
        for line in file:
            name, *fields = line.split()
            if name in names:
                # user, nice, system, idle, iowait, irq, softirq, and what other machines on the same host took
                user, nice, system, _, _, irq, softirq, stolen = map(int, fields[:8])
                ticks += user + nice + system + irq + softirq + stolen
                names.remove(name)
            elif not name.startswith("cpu"):
                break
    if names:
        raise ValueError(f"{STAT} says nothing of {', '.join(sorted(names))}")
    return ticks / os.sysconf("SC_CLK_TCK")
