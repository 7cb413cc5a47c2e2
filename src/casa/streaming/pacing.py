"""Pacing: a session against the clock. A file is watched frame by frame; a live stream keeps up, whatever it costs.

    source  --reader thread-->  [newest frame]  --encoder thread-->  [newest, encoded]  --this thread-->  captions

The next frame is decoded, encoded and projected while words are still being found for the last. Each box holds one
frame. Of a file, whoever puts one waits until there is room. Live, a newer frame replaces it, and what is replaced is
counted as dropped: nothing queues up, and lag cannot accumulate. A caption is cut at its budget, the time between two
frames, which begins with its first token: a machine that is too slow watches fewer frames and says less of them, but
something of each.

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

import numpy as np
from PIL import Image

from casa.errors import UserError

MIN_FRAMES, TOO_MANY = 4, 0.2  # frames by which a machine can be judged, and the share dropped or cut that is too much
PATIENCE = 5.0  # s that the end of a watch waits for a source that neither gives nor ends
Clock = Callable[[], float]
Item = TypeVar("Item")


class TimedFrame(Protocol):
    """A frame and its time in the stream, in seconds."""

    @property
    def image(self) -> Image.Image | np.ndarray: ...

    @property
    def time(self) -> float: ...


# a frame, what the session takes of it, and when it was there
Ready = tuple[TimedFrame, Any, float]


class Watcher(Protocol):
    """What is paced: a StreamingSession, or anything like it."""

    def check(self, frame: Any) -> Any:
        """The frame as a picture; raises ValueError or TypeError, here and nowhere else, if it is none."""
        ...

    def encode(self, frame: Any) -> Any:
        """Encodes and projects a frame; may run in another thread, while `step` runs."""
        ...

    def step(self, frame: Any, should_stop: Callable[[], bool] | None = None) -> str: ...


@dataclass(frozen=True)
class FrameCaption:
    """What was said of one frame.

    Args:
        time: the frame's time in the stream, in seconds.
        text: "" if nothing.
        lag: seconds from the frame's being there to the caption's; of a file in real time, from when it was due.
        latency: seconds of finding words.
        complete: False if the caption was cut at its budget.
    """

    time: float
    text: str
    lag: float
    latency: float
    complete: bool


@dataclass
class WatchCounts:
    """What became of the frames.

    Args:
        frames: watched.
        dropped: replaced by a newer one before their turn.
        truncated: captions and answers that ran out of time.
        skipped: frames that were no pictures.
    """

    frames: int = 0
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0

    @property
    def is_too_much(self) -> bool:
        """Whether the machine is too slow for it. One frame or two too few say nothing of that, and silence neither."""
        due = self.frames + self.dropped
        return due >= MIN_FRAMES and self.dropped + self.truncated > TOO_MANY * due


class TimeBudget:
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


@dataclass
class Box(Generic[Item]):
    """Room for one item between two threads."""

    _item: Item | None = None
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, item: Item) -> int:
        """Puts an item in place of the one that lies there; how many went unread, 0 or 1."""
        with self._changed:
            late = self._item is not None
            self._item = item
            self._changed.notify_all()
            return int(late)

    def hand(self, item: Item) -> bool:
        """Waits for room, and puts the item there; False if the box was closed before."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is None or self._closed)
            if not self._closed:
                self._item = item
                self._changed.notify_all()
            return not self._closed

    def take(self) -> Item | None:
        """The item, once there is one; None when the box is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is not None or self._closed)
            item, self._item = self._item, None
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """No more items; what lies in the box can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def watch(
    session: Watcher,
    frames: Iterable[TimedFrame],
    counts: WatchCounts | None = None,
    *,
    prefetch: bool = True,
    clock: Clock = time.monotonic,
) -> Generator[FrameCaption, None, None]:
    """Watches every frame in turn, as fast as it goes.

    Args:
        session: what watches.
        frames: where the watch ends before they do, a `close` that they have is called, perhaps while another thread
            waits for the next frame.
        counts: filled on the way.
        prefetch: reads and encodes the next two frames, in another thread, while words are found for this one. What is
            said is the same.
        clock: in seconds.

    Raises:
        Exception: whatever the source or the session raises, after the captions of the frames before.
    """
    counts = counts if counts is not None else WatchCounts()
    ahead = _Prefetch(session, frames, counts, clock)
    with closing(ahead.in_turn() if prefetch else ahead.pictures()) as found:
        for frame, picture, _ in found:
            began = clock()
            text = session.step(picture)
            counts.frames += 1
            took = clock() - began
            yield FrameCaption(frame.time, text, took, took, True)


def watch_live(
    session: Watcher,
    frames: Iterable[TimedFrame],
    fps: float,
    *,
    counts: WatchCounts | None = None,
    in_real_time: bool = False,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], Any] | None = None,
) -> Generator[FrameCaption, None, None]:
    """Watches the newest frame, always, until the stream ends; the last frame is never dropped.

    Args:
        session: what watches.
        frames: as for `watch`.
        fps: frames per second that are looked at; 1 / fps is the budget of a caption, from its first token on.
        counts: filled on the way.
        in_real_time: `frames` comes from a file, and a frame is held back until its time.
        clock: in seconds.
        sleep: for tests; otherwise it is cut short by the end.

    Raises:
        UserError: fps is not above 0.
        Exception: whatever the source or the session raises, after the captions of the frames before.
    """
    if not fps > 0:
        raise UserError(f"fps is {fps}; give a number above 0.")
    counts = counts if counts is not None else WatchCounts()
    with closing(_Prefetch(session, frames, counts, clock).newest(in_real_time, sleep)) as found:
        for frame, picture, arrived in found:
            began = clock()
            budget = TimeBudget(clock, 1 / fps)
            text = session.step(picture, should_stop=budget)
            counts.frames += 1
            counts.truncated += budget.spent
            now = clock()
            yield FrameCaption(frame.time, text, now - arrived, now - began, not budget.spent)


class _Prefetch:
    """The threads ahead of the text: frames read, checked, encoded."""

    def __init__(self, session: Watcher, frames: Iterable[TimedFrame], counts: WatchCounts, clock: Clock) -> None:
        self._session, self._source, self._counts, self._clock = session, frames, counts, clock
        self._frames = iter(frames)
        self._is_waiting = False  # for the source
        self._stopped = threading.Event()
        self._counting = threading.Lock()
        self._read: Box[tuple[TimedFrame, float]] = Box()
        self._encoded: Box[Ready] = Box()
        self._error: BaseException | None = None

    def pictures(self) -> Generator[Ready, None, None]:
        """All frames that are pictures, in the thread that asks for them, not encoded."""
        for frame in self._reading():
            picture = self._picture(frame)
            if picture is not None:
                yield frame, picture, 0.0

    def in_turn(self) -> Generator[Ready, None, None]:
        """The same, encoded ahead by a thread: one waits while the next is being encoded."""

        def encode() -> None:
            for frame, picture, arrived in self.pictures():
                if not self._encoded.hand((frame, self._session.encode(picture), arrived)):
                    return

        return self._run({encode: self._encoded})

    def newest(self, in_real_time: bool, sleep: Callable[[float], Any] | None) -> Generator[Ready, None, None]:
        """The newest frame, encoded, and when it was there; a thread reads while another one encodes."""
        sleep = sleep if sleep is not None else self._stopped.wait

        def read() -> None:
            began = None
            for frame in self._reading():
                arrived = self._clock()
                if in_real_time:
                    began = arrived - frame.time if began is None else began
                    # when it was due, not when it was read: a reader that falls behind must show in the lag
                    arrived = began + frame.time
                    sleep(max(0.0, arrived - self._clock()))
                if self._stopped.is_set():
                    return
                self._drop(self._read.put((frame, arrived)))

        def encode() -> None:
            while (found := self._read.take()) is not None and not self._stopped.is_set():
                frame, arrived = found
                picture = self._picture(frame)
                if picture is not None:
                    self._drop(self._encoded.put((frame, self._session.encode(picture), arrived)))

        return self._run({read: self._read, encode: self._encoded})

    def _run(self, stages: dict[Callable[[], None], Box[Any]]) -> Generator[Ready, None, None]:
        """What the stages, each a thread that fills its box, come to. The first one reads the source."""

        def work(stage: Callable[[], None]) -> None:
            try:
                stage()
            except BaseException as error:  # handed to the thread that watches
                self._error = error
            finally:
                stages[stage].close()

        # daemons: a source that hangs must not keep the program from ending
        threads = [threading.Thread(target=work, args=[one], name="casa-prefetch", daemon=True) for one in stages]
        for thread in threads:
            thread.start()
        try:
            while (found := self._encoded.take()) is not None:
                yield found
        finally:
            self._stop(threads, list(stages.values()))
        if self._error is not None:
            raise self._error

    def _stop(self, threads: list[threading.Thread], boxes: list[Box[Any]]) -> None:
        """Ends the threads: while one computes, as long as that takes; for a source that hangs, not for ever."""
        self._stopped.set()
        for box in boxes:
            box.close()
        reader, *others = threads
        # a `Source` may be closed by any thread; a generator may not
        close = None if inspect.isgenerator(self._source) else getattr(self._source, "close", None)
        if close is not None and reader.is_alive():
            close()
        began = time.monotonic()
        while reader.is_alive() and not (self._is_waiting and time.monotonic() - began > PATIENCE):
            reader.join(0.1)
        for thread in others:
            thread.join()

    def _reading(self) -> Iterator[TimedFrame]:
        while True:
            self._is_waiting = True
            try:
                frame = next(self._frames, None)
            finally:
                self._is_waiting = False
            if frame is None:
                return
            yield frame

    def _picture(self, frame: TimedFrame) -> Any:
        """What the session is to look at; None, and counted, if it is no picture. A model that fails is not caught."""
        try:
            return self._session.check(frame.image)
        except (ValueError, TypeError):
            self._counts.skipped += 1
            return None

    def _drop(self, frames: int) -> None:
        # two threads count here
        with self._counting:
            self._counts.dropped += frames
