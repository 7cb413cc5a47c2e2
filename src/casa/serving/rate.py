"""A token bucket: how often something may happen, with bursts."""

from collections.abc import Callable
from time import monotonic

BURST_SECONDS = 2.0


class Rate:
    """`take` says whether one more is allowed now; on average `per_second`, at once two seconds' worth."""

    def __init__(self, per_second: float, clock: Callable[[], float] = monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._most = max(1.0, per_second * BURST_SECONDS)
        self._left, self._at = self._most, clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
