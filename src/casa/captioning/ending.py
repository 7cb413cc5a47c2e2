"""How a run is asked to end: by Ctrl-C, SIGTERM, or the end of its terminal. What is being written is written first."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Ending:
    """Inside a `with`, the first of these signals raises KeyboardInterrupt in the main thread, the second ends the
    process at once. One that is ignored, as by nohup, stays so.

    signal: the one that came, None if none has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._held = self._due = False
        self._before: dict[int, object] = {}

    @property
    def status(self) -> int:
        """The exit status of a process that ends by that signal, as shells count it; Ctrl-C's if none came."""
        return 128 + (signal.SIGINT if self.signal is None else self.signal)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # pyright: ignore[reportArgumentType]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # no thread is waited for, and none of Python's own endings comes in between
            os._exit(self.status)
        self.signal = number
        if self._held:
            self._due = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the first signal waits: its KeyboardInterrupt is raised at the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._due:
            self._due = False
            raise KeyboardInterrupt
