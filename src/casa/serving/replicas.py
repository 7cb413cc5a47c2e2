"""What an ingress knows of its replicas: where they are, what they sustain, and who is to have a stream or a chat.

Replicas report twice a second. One that is silent for some seconds, or cannot be reached, is left out.
"""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from casa.streaming.pacing import Clock

REPORT_SECONDS = 0.5
SILENT_SECONDS = 5.0
UNKNOWN_FPS = 8.0  # taken for what a replica sustains until it has measured it


@dataclass(frozen=True)
class Report:
    """What a replica says of itself.

    Args:
        name: Its own.
        address: Host and port, for the ingress alone.
        sustained_fps: Frames a second that it watches; None before anything was measured.
        asked_fps: Frames a second that its streams mean to send.
        streams: How many it has.
        chats: Under way and waiting.
        leaving: Whether its streams are on their way to others.
        process: Its number on its machine.
    """

    name: str
    address: str
    sustained_fps: float | None = None
    asked_fps: float = 0.0
    streams: int = 0
    chats: int = 0
    leaving: bool = False
    process: int = 0

    @property
    def share(self) -> float:
        """Of what it sustains, how much is asked for."""
        return self.asked_fps / (self.sustained_fps or UNKNOWN_FPS)


class Registry:
    """The newest report of each replica. On a cluster, an actor that all replicas and all ingresses know by name."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Report]] = {}

    def report(self, report: Report) -> None:
        self._reports[report.name] = self._clock(), report

    def leave(self, name: str) -> None:
        self._reports.pop(name, None)

    def reports(self) -> list[Report]:
        """Of all replicas that were heard of lately."""
        now = self._clock()
        self._reports = {name: pair for name, pair in self._reports.items() if now - pair[0] < SILENT_SECONDS}
        return [report for _, report in self._reports.values()]


class Replicas:
    """An ingress' own copy of the registry, with what it has handed out since.

    Args:
        read: Gives the reports; asked twice a second, in a thread of its own.
        wake: Called while somebody waits and there is no replica.
    """

    def __init__(self, read: Callable[[], Sequence[Report]], wake: Callable[[], object] = lambda: None) -> None:
        self._read, self._wake = read, wake
        self._known: dict[str, Report] = {}
        self._gone: dict[str, float] = {}  # those that could not be reached, and when
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._follow, name="casa-replicas", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            with suppress(Exception):  # the registry is being begun again: what is known is kept
                self.update(self._read())
            self._stopped.wait(REPORT_SECONDS)

    def update(self, reports: Iterable[Report]) -> None:
        """Takes over what replicas say."""
        now = monotonic()
        with self._lock:
            self._gone = {name: at for name, at in self._gone.items() if now - at < 2 * SILENT_SECONDS}
            self._known = {report.name: report for report in reports}

    def all(self) -> list[Report]:
        """Those that can be asked."""
        with self._lock:
            return [one for one in self._known.values() if one.name not in self._gone and not one.leaving]

    def lost(self, name: str) -> None:
        """Notes that a replica cannot be reached."""
        with self._lock:
            self._gone[name] = monotonic()
            self._known.pop(name, None)

    def took(self, name: str, fps: float) -> None:
        """Notes that a replica has one stream more, until it says so itself."""
        with self._lock:
            if (known := self._known.get(name)) is not None:
                self._known[name] = replace(known, asked_fps=known.asked_fps + fps, streams=known.streams + 1)

    def least_busy(self) -> list[Report]:
        """By how much of what they sustain is asked for, chats among it."""
        return sorted(self.all(), key=lambda one: (one.share + one.chats / UNKNOWN_FPS, one.name))

    def for_picture(self, picture: bytes) -> list[Report]:
        """In the order in which replicas are to be asked about a picture: always the same first, while it is there."""

        def weight(one: Report) -> bytes:
            return hashlib.sha256(one.name.encode() + picture).digest()

        return sorted(self.all(), key=weight)

    async def some(self, seconds: float) -> bool:
        """Waits until there is a replica; False if none has come in that time."""
        end = monotonic() + seconds
        while not self.all():
            if monotonic() >= end:
                return False
            await asyncio.to_thread(self._wake)
            await asyncio.sleep(REPORT_SECONDS / 5)
        return True

    def totals(self) -> dict[str, Any]:
        """Sums over all of them."""
        found = self.all()
        return {
            "replicas": len(found),
            "sessions": sum(one.streams for one in found),
            "sustained_fps": round(sum(one.sustained_fps or 0.0 for one in found), 2),
            "asked_fps": round(sum(one.asked_fps for one in found), 2),
        }
