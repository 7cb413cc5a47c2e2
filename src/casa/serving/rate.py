"""Who may go on, and when: a token bucket for how often something may happen, and a line before a few places."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from statistics import median
from time import monotonic

BURST_SECONDS = 2.0
LOOK_AFTER = 0.5  # seconds between looks at whether who waits is still there
MOST_SECONDS = 60  # that anybody is told to stay away


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


class Line:
    """`places` that are served at once, and room for `room` more to wait: who asks first goes first.

    To be used within one event loop. here: all that have joined and not left.
    """

    def __init__(self, places: int, room: int, clock: Callable[[], float] = monotonic) -> None:
        self._places, self._room, self._clock = places, room, clock
        self._waiting: deque[Guest] = deque()
        self._served: set[Guest] = set()
        self._seconds: deque[float] = deque(maxlen=16)  # that the last ones had a place
        self.here = 0

    @property
    def served(self) -> int:
        """Those that have a place."""
        return len(self._served)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def join(self) -> "Guest | None":
        """Somebody new, who is to `leave` whatever happens; None if there is no room."""
        if self.here >= self._places + self._room:
            return None
        self.here += 1
        return Guest(self)

    def expected_seconds(self) -> int:
        """After how long a newcomer may find room; 1 or more. By how long the last ones had a place, or those who have
        one now, if that is longer already.
        """
        now = self._clock()
        so_far = [now - guest.since for guest in self._served if guest.since is not None]
        each = max((median(seconds) for seconds in (self._seconds, so_far) if seconds), default=0.0)
        return max(1, min(MOST_SECONDS, math.ceil(each * (self.waiting + 1) / self._places)))

    def _call(self) -> None:
        """Gives free places to those who have waited longest."""
        while self._waiting and self.served < self._places:
            guest = self._waiting.popleft()
            self._served.add(guest)
            guest.since = self._clock()
            guest.called.set()


class Guest:
    """One in a line. since: when it got its place, if it has one."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.called = asyncio.Event()
        self.since: float | None = None

    async def turn(self, is_gone: Callable[[], Awaitable[bool]]) -> bool:
        """Waits for a place; False if who it is for has gone before."""
        self._line._waiting.append(self)
        self._line._call()
        while not self.called.is_set():
            try:
                async with asyncio.timeout(LOOK_AFTER):
                    await self.called.wait()
            except TimeoutError:
                if await is_gone():
                    return False
        return True

    def leave(self) -> None:
        line = self._line
        if self.since is not None:
            line._served.remove(self)
            line._seconds.append(line._clock() - self.since)
        elif self in line._waiting:
            line._waiting.remove(self)
        line.here -= 1
        line._call()
