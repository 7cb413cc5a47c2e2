"""The model's own thread: everything that computes happens here, so that nothing on the model meets another thread.

readers' tasks --offer, ask--> the engine --+
routes --call, chat--> jobs, completions ---+--> one thread: jobs, a step over all streams, a slice of one chat
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any, Protocol, TypeVar

from casa.errors import UserError
from casa.serving.limits import Limits
from casa.serving.live import LiveStream, QueuedFrame
from casa.serving.metrics import LoadMeter
from casa.streaming import SessionEvent, StreamingEngine, StreamingSession
from casa.streaming.pacing import Clock
from casa.threads import settle

SLICE_SECONDS = 0.05  # that one completion, or a step while others want its place, may take
CHAT_SHARE = 0.15  # of a step's time that the completion after it may take, where that is more

STOPPING = UserError("the server is stopping; try again later.")

log = logging.getLogger("casa.serving")
T = TypeVar("T")


class Work(Protocol):
    """Something long that is done in slices."""

    def advance(self, until: float) -> bool:
        """Works until that moment of the monotonic clock, or a little longer; True once all is done."""
        ...

    def fail(self, error: Exception) -> None: ...


class Worker:
    """Runs an engine, and sleeps until something waits. All methods but `work` may be called from any thread.

    A step ends where another stream would wait too long; what is half said by then goes on in the next one, with the
    frames that have come. So nobody waits for a long caption or answer. A slice of a chat follows.
    """

    def __init__(self, engine: StreamingEngine, limits: Limits, clock: Clock = monotonic) -> None:
        self.engine, self._limits, self._clock = engine, limits, clock
        self.load = LoadMeter(engine.max_batch_size, limits.load, clock)
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Callable[[], object], Future[Any]]] = deque()
        self._streams: dict[str, LiveStream] = {}
        self._chats: deque[Work] = deque()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="casa-model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step that is under way. What waited is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for _, future in self._jobs:
            future.cancel()
        self._jobs.clear()
        for chat in self._chats:
            chat.fail(STOPPING)
        self._chats.clear()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def streams(self) -> int:
        return len(self._streams)

    @property
    def chats(self) -> int:
        return len(self._chats)

    def call(self, job: Callable[[], T]) -> "Future[T]":
        """Has a short job done on the model's thread."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping:
                future.cancel()
            else:
                self._jobs.append((job, future))
                self._wake.notify()
        return future

    def chat(self, work: Work) -> None:
        """Has a completion done, a slice at a time."""
        with self._wake:
            if not self._stopping:
                self._chats.append(work)
                self._wake.notify()
                return
        work.fail(STOPPING)

    def open(
        self, stream: LiveStream, moved: Callable[[], StreamingSession | None] | None = None, **settings: Any
    ) -> "Future[str | None]":
        """Gives a stream a session with these settings; what the stream is to be told, if anything.

        `moved` is for a stream that comes from another replica, and is let in whatever is asked for already: it gives
        the session that it had there, or None for a new one.

        The future raises UserError if they are wrong, OverloadedError if there is one stream more than is sustained.
        """

        def job() -> str | None:
            advice = self.load.admit(stream.fps, self.asked()) if moved is None else None
            session = None if moved is None else moved()
            stream.session = self.engine.open(
                stream.name,
                session,
                caption_seconds=self._caption_seconds(stream),
                answer_seconds=self._limits.answer_seconds,
                **({} if session is not None else settings),
            )
            stream.measure()
            with self._wake:
                self._streams[stream.name] = stream
            return advice

        return self.call(job)

    def asked(self) -> list[float]:
        """Frames a second that each live stream means to send."""
        with self._wake:
            return [stream.fps for stream in self._streams.values()]

    def close(self, stream: LiveStream) -> "Future[None]":
        """Ends a stream, also one whose opening is still under way, and frees its state."""

        def job() -> None:
            with self._wake:
                self._streams.pop(stream.name, None)
            if stream.name in self.engine:
                self.engine.close(stream.name)
            stream.session = None
            stream.measure()

        return self.call(job)

    def offer(self, stream: LiveStream, frame: QueuedFrame) -> None:
        """Hands a stream its next frame; one that it replaces is counted as dropped."""
        if not self.engine.offer(stream.name, frame.picture, frame, frame.arrived):
            stream.drop()
        self._notify()

    def ask(self, stream: LiveStream, question: str) -> None:
        """Raises UserError if too many questions wait already."""
        self.engine.ask(stream.name, question, question)
        self._notify()

    def pause(self, stream: LiveStream, paused: bool) -> None:
        """A paused stream watches nothing and still answers."""
        self.engine.pause(stream.name, paused)

    def cache_bytes(self) -> int:
        """Bytes that all live streams hold."""
        with self._wake:
            return sum(stream.cache_bytes for stream in self._streams.values())

    def _caption_seconds(self, stream: LiveStream) -> float:
        return min(1 / stream.fps, self._limits.caption_seconds)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._jobs or self._chats or self.engine.waiting > 0)
                if self._stopping:
                    return
            self.work()

    def work(self) -> None:
        """One round, on this worker's thread: the jobs that wait, a step over the streams, a slice of one chat."""
        with self._wake:
            jobs = list(self._jobs)
            self._jobs.clear()
        for job, future in jobs:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:
                    future.set_exception(error)
        try:
            begun = self._clock()
            if self.engine.waiting:
                self._step()
            # on a machine that is too slow for its streams, chats must not stand still
            self._advance_chat(max(SLICE_SECONDS, CHAT_SHARE * (self._clock() - begun)))
        except Exception:  # whatever it was, the other streams go on
            log.exception("the model's thread met an error")

    def _step(self) -> None:
        rows, start, words_since = min(self.engine.waiting, self.engine.max_batch_size), self._clock(), math.inf

        def should_yield() -> bool:
            nonlocal words_since
            words_since = min(words_since, self._clock())
            return self._is_wanted(words_since)

        try:
            ended = self.engine.step(should_yield=should_yield, on_event=self._on_event)
        except Exception as error:
            # the engine answers for its sessions; whatever this was, their states are as they were
            log.exception("a step over %d streams failed", rows)
            for stream in list(self._streams.values()):
                if self.engine.forget(stream.name):
                    stream.fail(f"the model failed at this ({type(error).__name__}); it was left out.")
        else:
            self.load.stepped(self._clock() - start, rows, len(ended))

    def _is_wanted(self, words_since: float) -> bool:
        """Whether a step is to end here, since somebody who is not in it has waited long enough.

        A stream waits for half the time of a caption, so that it is in time for its next frame. Nobody runs out of
        patience before the step's first words were there, `words_since`: where pictures alone take longer than that,
        every step would end after one word, and every caption be cut after a few.
        """
        now = self._clock()
        if self.engine.is_crowded and now >= words_since + SLICE_SECONDS:
            return True
        with self._wake:
            if self._stopping or self._jobs:
                return True
            patience = {name: self._caption_seconds(stream) / 2 for name, stream in self._streams.items()}
        waiting = self.engine.waiting_since()
        return any(now >= max(since, words_since) + patience.get(name, 0.0) for name, since in waiting.items())

    def _on_event(self, event: SessionEvent) -> None:
        """Tells a stream what its turn came to, in the middle of a step."""
        if (stream := self._streams.get(event.session)) is None:
            return
        try:
            stream.on_event(event)
        except Exception as error:  # the others are told theirs
            log.exception("what a stream said was lost")
            stream.fail(f"the server failed at this ({type(error).__name__}); it was left out.", event.tag)

    def _advance_chat(self, seconds: float) -> None:
        """A slice, of so many seconds, of the completion that has waited longest."""
        with self._wake:
            chat = self._chats.popleft() if self._chats else None
        if chat is None:
            return
        try:
            settle()
            done = chat.advance(self._clock() + seconds)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a completion failed")
            chat.fail(error)
            done = True
        if not done:
            self.chat(chat)
