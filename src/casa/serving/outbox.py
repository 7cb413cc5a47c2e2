"""Events on their way to one reader: put from any thread, never waiting; a slow reader loses the oldest captions.

model's thread --put--> [e e e e e]  --get--> the reader's own task
                         at most `most`: what is too much leaves at the front, least important kinds first
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# in the order in which a slow reader loses them; answers, errors and the rest are lost only if nothing else waits
LOSABLE = ("usage", "dropped", "caption")


class Outbox:
    """To be made in the event loop of its reader. missed: captions that were lost because the reader was slow; lost:
    called for each of them.
    """

    def __init__(self, most: int, lost: Callable[[], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._events: deque[dict[str, Any]] = deque()
        self._lock = threading.Lock()
        self._most, self._lost = most, lost
        self.missed = 0

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: dict[str, Any]) -> None:
        with self._lock:
            if len(self._events) >= self._most:
                self._lose_one()
            self._events.append(event)
        # the loop may have ended, and the reader with it
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> dict[str, Any]:
        """The next event; captions and usage say how many captions were missed until then."""
        while True:
            with self._lock:
                if self._events:
                    event = self._events.popleft()
                    return event | {"missed": self.missed} if event["type"] in ("caption", "usage") else event
                self._ready.clear()
            await self._ready.wait()

    def _lose_one(self) -> None:
        for kind in LOSABLE:
            for index, event in enumerate(self._events):
                if event["type"] == kind:
                    del self._events[index]
                    if kind == "caption":
                        self.missed += 1
                        if self._lost is not None:
                            self._lost()
                    return
        self._events.popleft()
