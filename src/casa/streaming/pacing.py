"""Pacing: a session against the clock. A file is watched frame by frame; a live stream keeps up, whatever it costs.

    source  --reader thread-->  [newest frame]  --looker thread-->  [newest, encoded]  --this thread-->  captions

The next frame is decoded, encoded and projected while words are still being found for the last (DESIGN: the image side
runs ahead). Each box holds one frame. Of a file, whoever puts one waits until there is room. Live, a newer frame
replaces it, and what is replaced is counted as dropped: nothing queues up, and lag cannot accumulate. A caption is cut
at its budget, the time between two frames, which begins with its first token: a machine that is too slow watches fewer
frames and says less of them, but something of each.

However a watch ends, its threads have ended before it does: a process that goes while one of them computes is aborted.
"""

import inspect
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from casa.errors import UserError

FEWEST, TOO_MANY = 4, 0.2  # frames by which a machine can be judged, and the share dropped or cut that is too much
PATIENCE = 5.0  # s that the end of a watch waits for a source that neither gives nor ends
Clock = Callable[[], float]
Item = TypeVar("Item")


class Watcher(Protocol):
    """What is paced: a StreamingSession, or anything like it."""

    def check(self, frame: Any) -> Any:
        """The frame as a picture; raises ValueError or TypeError, here and nowhere else, if it is none."""
        ...

    def look(self, frame: Any) -> Any:
        """Encodes and projects a frame; may run in another thread, while `step` runs."""
        ...

    def step(self, frame: Any, cut: Callable[[], bool] | None = None) -> str: ...


@dataclass(frozen=True)
class FrameCaption:
    """What was said of one frame.

    time: of the frame, in seconds from the stream's beginning. text: "" if nothing. lag: seconds from the frame's being
    there to the caption's; of a file in real time, from when the frame was due. took: seconds of finding words.
    complete: False if the caption was cut at its budget.
    """

    time: float
    text: str
    lag: float
    took: float
    complete: bool


@dataclass
class Count:
    """frames: watched. dropped: replaced by a newer one before their turn. cut: captions and answers that ran out of
    time. skipped: frames that were no pictures."""

    frames: int = 0
    dropped: int = 0
    cut: int = 0
    skipped: int = 0

    @property
    def is_too_much(self) -> bool:
        """Whether the machine is too slow for it. One frame or two too few say nothing of that, and silence neither."""
        due = self.frames + self.dropped
        return due >= FEWEST and self.dropped + self.cut > TOO_MANY * due


@dataclass
class Box(Generic[Item]):
    """Room for one item between two threads. A newer one replaces it; `put` says how many went unread (0 or 1)."""

    _item: Item | None = None
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, item: Item) -> int:
        with self._changed:
            late = self._item is not None
            self._item = item
            self._changed.notify_all()
            return int(late)

    def hand(self, item: Item) -> bool:
        """Waits for room, and puts the item there; False if the box was closed before."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is None or self._closed)
            if self._closed:
                return False
            self._item = item
            self._changed.notify_all()
            return True

    def take(self) -> Item | None:
        """The item, once there is one; None when the box is closed and empty."""
        with self._changed:
            while self._item is None and not self._closed:
                self._changed.wait()
            item, self._item = self._item, None
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """No more items; what lies in the box can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Reading:
    """A source as its thread reads it: whether that waits for a frame, and how to let it go.

    A `close` that it has (a `Source`'s) is one that any thread may call; a generator's is not.
    """

    def __init__(self, frames: Iterable[Any]) -> None:
        self._source, self._frames = frames, iter(frames)
        self.waits = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.waits = True
        try:
            return next(self._frames)
        finally:
            self.waits = False

    def end(self, thread: threading.Thread) -> None:
        """Waits for the thread: while it computes, as long as that takes; for a source that hangs, not for ever."""
        close = None if inspect.isgenerator(self._source) else getattr(self._source, "close", None)
        if close is not None and thread.is_alive():
            close()
        began = time.monotonic()
        while thread.is_alive() and not (self.waits and time.monotonic() - began > PATIENCE):
            thread.join(0.1)


def watch(
    session: Watcher,
    frames: Iterable[Any],
    count: Count | None = None,
    *,
    ahead: bool = True,
    clock: Clock = time.monotonic,
) -> Generator[FrameCaption, None, None]:
    """Every frame in turn, as fast as it goes. frames: objects with `image` and `time` (seconds). Where the watch ends
    before they do, a `close` that they have is called: it may come while another thread waits for the next.

    ahead: read and encode the next two frames, in another thread, while words are found for this one. What is said is
    the same. Raises whatever the source or the session raises, after the captions of the frames before.
    """
    count = count if count is not None else Count()
    seen = _looked_ahead(session, frames, count) if ahead else _pictures(session, frames, count)
    with closing(seen):
        for frame, picture in seen:
            began = clock()
            text = session.step(picture)
            count.frames += 1
            took = clock() - began
            yield FrameCaption(frame.time, text, took, took, True)


def _picture(session: Watcher, frame: Any, count: Count) -> Any:
    """What the session is to look at; None, and counted, if it is no picture. A model that fails is no such thing."""
    try:
        return session.check(frame.image)
    except (ValueError, TypeError):
        count.skipped += 1
        return None


def _pictures(session: Watcher, frames: Iterable[Any], count: Count) -> Generator[tuple[Any, Any], None, None]:
    """Frames with their pictures, those without one left out."""
    for frame in frames:
        picture = _picture(session, frame, count)
        if picture is not None:
            yield frame, picture


def _looked_ahead(session: Watcher, frames: Iterable[Any], count: Count) -> Generator[tuple[Any, Any], None, None]:
    """Frames with what the session saw in them: one waits in the box while the next is being looked at."""
    reading = _Reading(frames)
    box: Box[tuple[Any, Any]] = Box()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for frame, picture in _pictures(session, reading, count):
                if not box.hand((frame, session.look(picture))):
                    break
        except BaseException as error:  # handed to the thread that watches
            errors.append(error)
        finally:
            box.close()

    # a daemon: a source that hangs must not keep the program from ending
    thread = threading.Thread(target=work, name="casa-look", daemon=True)
    thread.start()
    try:
        while (found := box.take()) is not None:
            yield found
    finally:
        box.close()
        reading.end(thread)
    if errors:
        raise errors[0]


def watch_live(
    session: Watcher,
    frames: Iterable[Any],
    fps: float,
    *,
    count: Count | None = None,
    in_real_time: bool = False,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], Any] | None = None,
) -> Generator[FrameCaption, None, None]:
    """The newest frame, always, until the stream ends; the last frame is never dropped. frames: as for `watch`.

    fps: frames per second that are looked at; 1 / fps is the budget of a caption, from its first token on.
    in_real_time: `frames` comes from a file, and a frame is held back until its time. sleep: for tests; otherwise it is
    cut short by the end. Raises UserError for an fps that is not above 0, and whatever the source or the session
    raises, after the captions of the frames before.
    """
    if not fps > 0:
        raise UserError(f"fps is {fps}; give a number above 0.")
    count = count if count is not None else Count()
    live = _Live(session, frames, count, in_real_time, clock, sleep)
    live.start()
    try:
        while (found := live.looked.take()) is not None:
            frame, seen, arrived = found
            began = clock()
            budget = Budget(clock, 1 / fps)
            text = session.step(seen, cut=budget)
            count.frames += 1
            count.cut += budget.spent
            now = clock()
            yield FrameCaption(frame.time, text, now - arrived, now - began, not budget.spent)
    finally:
        live.stop()
    if live.error is not None:
        raise live.error


class Budget:
    """Says True once `seconds` have passed since it was first asked: when the first token was about to be chosen.

    spent: whether it has said so.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds, self._deadline, self.spent = clock, seconds, math.inf, False

    def __call__(self) -> bool:
        now = self._clock()
        if self._deadline == math.inf:
            self._deadline = now + self._seconds
        self.spent = self.spent or now >= self._deadline
        return self.spent


class _Live:
    """The two threads ahead of the text."""

    def __init__(
        self,
        session: Watcher,
        frames: Iterable[Any],
        count: Count,
        in_real_time: bool,
        clock: Clock,
        sleep: Callable[[float], Any] | None,
    ) -> None:
        self._session, self._frames, self._count = session, _Reading(frames), count
        self._stopped = threading.Event()
        self._in_real_time, self._clock = in_real_time, clock
        self._sleep = sleep if sleep is not None else self._stopped.wait
        self._read: Box[tuple[Any, float]] = Box()
        self.looked: Box[tuple[Any, Any, float]] = Box()
        self.error: BaseException | None = None
        self._counting = threading.Lock()
        self._threads = [
            threading.Thread(target=work, name="casa-look", daemon=True) for work in (self._reading, self._looking)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads."""
        self._stopped.set()
        self._read.close()
        self.looked.close()
        reader, looker = self._threads
        self._frames.end(reader)
        looker.join()

    def _drop(self, frames: int) -> None:
        # both threads count here
        with self._counting:
            self._count.dropped += frames

    def _reading(self) -> None:
        began = None
        try:
            for frame in self._frames:
                if self._stopped.is_set():
                    break
                arrived = self._clock()
                if self._in_real_time:
                    began = arrived - frame.time if began is None else began
                    # when it was due, not when it was read: a reader that falls behind must show in the lag
                    arrived = began + frame.time
                    self._sleep(max(0.0, arrived - self._clock()))
                    if self._stopped.is_set():
                        break
                self._drop(self._read.put((frame, arrived)))
        except BaseException as error:  # handed to the thread that watches
            self.error = error
        finally:
            self._read.close()

    def _looking(self) -> None:
        try:
            while (found := self._read.take()) is not None and not self._stopped.is_set():
                frame, arrived = found
                picture = _picture(self._session, frame, self._count)
                if picture is not None:
                    self._drop(self.looked.put((frame, self._session.look(picture), arrived)))
        except BaseException as error:
            self.error = error
        finally:
            self.looked.close()
