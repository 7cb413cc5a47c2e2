"""Reading ahead: a source runs in a thread of its own, a bounded number of frames in front of whoever takes them.

    source --thread--> [ at most `size` frames ] --> next(ahead)

With drop="oldest" a newer frame pushes the oldest out (live: never old pictures); with drop="none" the thread waits.
"""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Literal, Self

from casa.errors import UserError
from casa.media.source import Counts, Frame, Source

# Seconds that `close` waits for the thread, which may be in the middle of reading from a network.
PATIENCE = 1.0


class Ahead(Iterator[Frame]):
    """A source read ahead; itself used like a source. Reading begins with the `with` block, or with the first `next`.

    counts: the source's own; `dropped` says how many frames made way for newer ones. What the source raises is raised
    here, after the frames that came before.
    Raises UserError for a size below 1 or another `drop`.
    """

    def __init__(self, source: Source, size: int = 1, drop: Literal["oldest", "none"] = "oldest") -> None:
        if size < 1:
            raise UserError(f"size is {size}: give room for one frame or more.")
        if drop not in ("oldest", "none"):
            raise UserError(f'drop is {drop!r}: give "oldest" or "none".')
        self._source, self._size, self._drop = source, size, drop
        self._ready: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        # a daemon: a source that hangs must not keep the program from ending
        self._thread = threading.Thread(target=self._run, name="casa-ahead", daemon=True)
        self._started = False

    @property
    def describe(self) -> str:
        return self._source.describe

    @property
    def is_live(self) -> bool:
        return self._source.is_live

    @property
    def counts(self) -> Counts:
        return self._source.counts

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __next__(self) -> Frame:
        self._start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self._stopped)
            if self._stopped:
                raise StopIteration
            if self._ready:
                frame = self._ready.popleft()
                self._changed.notify_all()
                return frame
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop reading and let go of the source; may be called again, and from any thread."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
            running = self._started
        self._source.close()
        if running and threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE)

    def _start(self) -> None:
        with self._changed:
            if self._started or self._stopped:
                return
            self._started = True
            self._thread.start()

    def _run(self) -> None:
        try:
            for frame in self._source:
                if not self._put(frame):
                    break
        except BaseException as error:  # raised again where the frames are taken
            self._error = error
        finally:
            self._source.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        with self._changed:
            if self._drop == "none":
                self._changed.wait_for(lambda: len(self._ready) < self._size or self._stopped)
            if self._stopped:
                return False
            if len(self._ready) == self._size:
                self._ready.popleft()
                self._source.counts.dropped += 1
            self._ready.append(frame)
            self._changed.notify_all()
            return True
