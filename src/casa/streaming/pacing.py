"""Pacing: a session against the clock. A file is watched frame by frame; a live stream keeps up, whatever it costs.

    source  --reader thread-->  [newest frame]  --encoder thread-->  [newest, encoded]  --this thread-->  captions

Each box holds one frame. Of a file, whoever puts one waits for room. Live, a newer frame replaces it and counts it as
dropped, so lag cannot accumulate. All threads end before a watch does: a process must not end while one computes.
"""

import inspect
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.streaming.session import StepFrame, StreamingSession

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


# a frame, what the session takes of it, and when it was there (None of a file)
Ready: TypeAlias = tuple[TimedFrame, StepFrame, float | None]


@dataclass(frozen=True)
class FrameCaption:
    """What was said of one frame.

    Args:
        time: The frame's time in the stream, in seconds.
        text: "" if nothing.
        lag: Seconds from the frame's being there to the caption's; of a file in real time, from when it was due.
        latency: Seconds of finding words.
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
        frames: Watched.
        dropped: Replaced by a newer one before their turn.
        truncated: Captions and answers that ran out of time.
        skipped: Frames that were no pictures.
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
    """Says True once `seconds` have passed since it was first asked, which is before the first token is chosen.

    Attributes:
        spent: Whether it has said so.
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

    def put(self, item: Item, *, wait: bool = False) -> int:
        """Puts an item, once there is room if it may wait; how many it replaces, 0 or 1."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._item is None or self._closed)
            replaced, self._item = int(self._item is not None), item
            self._changed.notify_all()
            return replaced

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
    session: StreamingSession, frames: Iterable[TimedFrame], counts: WatchCounts | None = None, *, prefetch: bool = True
) -> Generator[FrameCaption, None, None]:
    """Watches every frame in turn, as fast as it goes.

    Args:
        session: What watches.
        frames: Where the watch ends before they do, a `close` that they have is called, perhaps while another thread
            waits for the next frame.
        counts: Filled on the way.
        prefetch: Reads and encodes the next two frames, in another thread, while words are found for this one. What is
            said is the same.

    Raises:
        Exception: Whatever the source or the session raises, after the captions of the frames before.
    """
    ahead = _Prefetch(session, frames, counts or WatchCounts(), time.monotonic)
    return ahead.captions(ahead.in_turn() if prefetch else ahead.pictures(), math.inf)


def watch_live(
    session: StreamingSession,
    frames: Iterable[TimedFrame],
    fps: float,
    *,
    counts: WatchCounts | None = None,
    in_real_time: bool = False,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], object] | None = None,
) -> Generator[FrameCaption, None, None]:
    """Watches the newest frame, always, until the stream ends; the last frame is never dropped.

    Args:
        session: What watches.
        frames: As for `watch`.
        fps: Frames per second that are looked at; 1 / fps is the budget of a caption, from its first token on.
        counts: Filled on the way.
        in_real_time: `frames` comes from a file, and a frame is held back until its time.
        clock: In seconds.
        sleep: For tests; otherwise it is cut short by the end.

    Raises:
        UserError: fps is not above 0.
        Exception: Whatever the source or the session raises, after the captions of the frames before.
    """
    if not fps > 0:
        raise UserError(f"fps is {fps}; give a number above 0.")
    ahead = _Prefetch(session, frames, counts or WatchCounts(), clock)
    return ahead.captions(ahead.newest(in_real_time, sleep), 1 / fps)


class _Prefetch:
    """The threads ahead of the text: frames read, checked, encoded."""

    def __init__(
        self, session: StreamingSession, frames: Iterable[TimedFrame], counts: WatchCounts, clock: Clock
    ) -> None:
        self._session, self._source, self._counts, self._clock = session, frames, counts, clock
        self._frames = iter(frames)
        self._is_waiting = False  # for the source
        self._stopped = threading.Event()
        self._counting = threading.Lock()
        self._read: Box[tuple[TimedFrame, float]] = Box()
        self._encoded: Box[Ready] = Box()
        self._error: BaseException | None = None

    def captions(self, ready: Generator[Ready, None, None], seconds: float) -> Generator[FrameCaption, None, None]:
        """What is said of the frames that are ready, of each for at most so many seconds."""
        with closing(ready):
            for frame, picture, arrived in ready:
                began = self._clock()
                budget = TimeBudget(self._clock, seconds)
                text = self._session.step(picture, should_stop=budget)
                self._counts.frames += 1
                self._counts.truncated += budget.spent
                now = self._clock()
                lag = now - (began if arrived is None else arrived)
                yield FrameCaption(frame.time, text, lag, now - began, not budget.spent)

    def pictures(self) -> Generator[Ready, None, None]:
        """All frames that are pictures, in the thread that asks for them, not encoded."""
        for frame in self._reading():
            if (picture := self._picture(frame)) is not None:
                yield frame, picture, None

    def in_turn(self) -> Generator[Ready, None, None]:
        """The same, encoded ahead by a thread: one waits while the next is being encoded."""

        def encode() -> None:
            for frame in self._reading():
                if (picture := self._picture(frame)) is not None:
                    self._encoded.put((frame, self._session.encode(picture), None), wait=True)
                if self._stopped.is_set():
                    return

        return self._run({encode: self._encoded})

    def newest(self, in_real_time: bool, sleep: Callable[[float], object] | None) -> Generator[Ready, None, None]:
        """The newest frame, encoded, and when it was there; a thread reads while another one encodes."""
        sleep = sleep or self._stopped.wait

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
                if (picture := self._picture(frame)) is not None:
                    self._drop(self._encoded.put((frame, self._session.encode(picture), arrived)))

        return self._run({read: self._read, encode: self._encoded})

    def _run(
        self, stages: "dict[Callable[[], None], Box[Ready] | Box[tuple[TimedFrame, float]]]"
    ) -> Generator[Ready, None, None]:
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
            self._stopped.set()
            for box in stages.values():
                box.close()
            self._join(*threads)
        if self._error is not None:
            raise self._error

    def _join(self, reader: threading.Thread, *others: threading.Thread) -> None:
        """Waits for threads that compute as long as that takes; for a source that hangs, not for ever."""
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

    def _picture(self, frame: TimedFrame) -> Image.Image | None:
        """The frame as a picture; None, and counted, if it is none. A model that fails is not caught."""
        try:
            return self._session.check(frame.image)
        except (ValueError, TypeError):
            self._counts.skipped += 1
            return None

    def _drop(self, frames: int) -> None:
        with self._counting:  # two threads count here
            self._counts.dropped += frames
