"""The model's own thread: everything that computes happens here, so that nothing on the model meets another thread.

    readers' tasks --offer, ask--> LiveStreams --+
    routes --call--> short jobs ---------------- +--> one thread: jobs, a step over all streams, a slice of one chat
    routes --chat--> completions ----------------+

It sleeps until something waits. What a stream says is cut at that stream's own budget, which begins with the first
token, and told as soon as it is there. A step ends where another stream would wait too long; what is half said by then
goes on in the next one, with the frames that have come. So nobody waits for a long caption or answer. Streams have a
turn after every slice of a chat.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from casa.errors import UserError
from casa.serving.limits import Limits
from casa.serving.live import LiveStream, Ticket, Turn
from casa.serving.load import Load
from casa.streaming import Event, StreamingEngine
from casa.streaming.pacing import Budget, Clock
from casa.threads import settle

SLICE_SECONDS = 0.05  # that one completion, or a step while others want its place, may take
CHAT_SHARE = 0.15  # of a step's time that the completion after it may take, where that is more

STOPPING = UserError("the server is stopping; try again later.")

log = logging.getLogger("casa.serving")


class Work(Protocol):
    """Something long that is done in slices."""

    def advance(self, until: float) -> bool:
        """Works until that moment of the monotonic clock, or a little longer; True once all is done."""
        ...

    def fail(self, error: Exception) -> None: ...


@dataclass(frozen=True)
class _Begun:
    """A turn that a stream has, since `start` by the monotonic clock. budget: of its words, over all steps it takes."""

    stream: LiveStream
    turn: Turn
    start: float
    budget: Budget


class Worker:
    """Runs an engine. All methods but `run`'s own may be called from any thread."""

    def __init__(self, engine: StreamingEngine, limits: Limits, clock: Clock = monotonic) -> None:
        self.engine, self._limits, self._clock = engine, limits, clock
        self.load = Load(engine.most_rows, limits.load, clock)
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._streams: dict[str, LiveStream] = {}
        self._begun: dict[str, _Begun] = {}  # by the stream's name
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

    def call(self, job: Callable[[], Any]) -> "Future[Any]":
        """Has a short job done on the model's thread."""
        future: Future[Any] = Future()
        with self._wake:
            if self._stopping:
                future.cancel()
                return future
            self._jobs.append((job, future))
            self._wake.notify()
        return future

    def chat(self, work: Work) -> None:
        with self._wake:
            stopping = self._stopping
            if not stopping:
                self._chats.append(work)
                self._wake.notify()
        if stopping:
            work.fail(STOPPING)

    def open(self, stream: LiveStream, **settings: Any) -> "Future[Any]":
        """Gives a stream a session with these settings. The future has what the stream is to be told, if anything; it
        raises UserError if they are wrong, and OverloadedError if this machine does not sustain one more stream.
        """

        def job() -> str | None:
            advice = self.load.admit(stream.fps, self.asked())
            stream.session = self.engine.open(stream.name, **settings)
            stream.measure()
            with self._wake:
                self._streams[stream.name] = stream
            return advice

        return self.call(job)

    def asked(self) -> list[float]:
        """Frames a second that each live stream means to send."""
        with self._wake:
            return [stream.fps for stream in self._streams.values()]

    def close(self, stream: LiveStream) -> "Future[Any]":
        """Ends a stream, also one whose opening is still under way, and frees its state."""

        def job() -> None:
            with self._wake:
                self._streams.pop(stream.name, None)
            self._begun.pop(stream.name, None)
            if stream.name in self.engine:
                self.engine.close(stream.name)
            stream.session = None
            stream.measure()

        return self.call(job)

    def offer(self, stream: LiveStream, ticket: Ticket) -> None:
        with self._wake:
            stream.offer(ticket)
            self._wake.notify()

    def ask(self, stream: LiveStream, question: str) -> None:
        """Raises UserError if too many questions wait already."""
        with self._wake:
            if stream.questions >= self._limits.questions:
                raise UserError(f"{stream.questions} questions wait for their answers; ask again later.")
            stream.ask(question)
            self._wake.notify()

    def drop(self, stream: LiveStream) -> None:
        """Counts a frame that was replaced by a newer one before it could be offered."""
        with self._wake:
            stream.drop()

    def refuse(self, stream: LiveStream) -> None:
        """Counts a frame that came too soon after others: not watched, and not for want of time."""
        with self._wake:
            stream.drop(late=False)

    def pause(self, stream: LiveStream, paused: bool) -> None:
        with self._wake:
            stream.pause(paused)
            self._wake.notify()

    def cache_bytes(self) -> int:
        """Bytes that all live streams hold."""
        with self._wake:
            return sum(stream.cache_bytes for stream in self._streams.values())

    def _has_work(self) -> bool:
        return (
            self._stopping
            or bool(self._jobs)
            or bool(self._chats)
            or bool(self._begun)
            or any(stream.waits for stream in self._streams.values())
        )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._stopping:
                    return
            self.work()

    def work(self) -> None:
        """One round, on this worker's thread: the jobs that wait, a step over the streams, a slice of one chat."""
        with self._wake:
            jobs = list(self._jobs)
            self._jobs.clear()
        for job, future in jobs:
            _do(job, future)
        try:
            self._begin()
            begun = self._clock()
            if self._begun:
                self._step()
            # on a machine that is too slow for its streams, chats must not stand still
            self._advance_chat(max(SLICE_SECONDS, CHAT_SHARE * (self._clock() - begun)))
        except Exception:  # whatever it was, the other streams go on
            log.exception("the model's thread met an error")

    def _begin(self) -> None:
        """A turn for each stream that waits, as many as the next step has room for beside those that go on.

        Who is in a step goes to the end of the line, as in the engine, which then chooses the same.
        """
        start, room = self._clock(), self.engine.most_rows
        with self._wake:
            for name, stream in list(self._streams.items()):
                if room == 0:
                    return
                if name not in self._begun:
                    if (turn := stream.take()) is None:
                        continue
                    if turn.ticket is not None:
                        self.engine.offer(name, turn.ticket.picture)
                    else:
                        self.engine.ask(name, turn.question)
                    budget = Budget(self._clock, stream.budget(turn, self._limits))
                    self._begun[name] = _Begun(stream, turn, start, budget)
                self._streams[name] = self._streams.pop(name)
                room -= 1

    def _step(self) -> None:
        cuts = {name: begun.budget for name, begun in self._begun.items()}
        begun, rows, start = len(self._begun), min(len(self._begun), self.engine.most_rows), self._clock()
        # some that have begun have no place in this step
        is_crowded, words_since = begun > rows, math.inf

        def halt() -> bool:
            nonlocal words_since
            words_since = min(words_since, self._clock())
            return self._is_wanted(words_since, is_crowded)

        try:
            self.engine.step(cuts=cuts, halt=halt, tell=self._tell)
        except Exception as error:
            # the engine answers for its sessions; whatever this was, their states are as they were
            log.exception("a step over %d streams failed", len(self._begun))
            for name, begun in self._begun.items():
                self.engine.forget(name)
                begun.stream.fail(begun.turn, f"the model failed at this ({type(error).__name__}); it was left out.")
            self._begun.clear()
        else:
            self.load.stepped(self._clock() - start, rows, begun - len(self._begun))

    def _is_wanted(self, words_since: float, is_crowded: bool) -> bool:
        """Whether a step is to end here, since somebody who is not in it has waited long enough.

        words_since: when its first words were there. Only from then on does anybody run out of patience: where pictures
        alone take longer than that, every step would end after one word, and every caption be cut after a few.
        """
        now = self._clock()
        if is_crowded and now >= words_since + SLICE_SECONDS:
            return True
        with self._wake:
            if self._stopping or self._jobs:
                return True
            waiting = [stream for name, stream in self._streams.items() if name not in self._begun]
            return any(
                (since := stream.waits_since) is not None
                and now >= max(since, words_since) + stream.patience(self._limits)
                for stream in waiting
            )

    def _tell(self, event: Event) -> None:
        """Tells a stream what its turn came to, in the middle of a step."""
        if (begun := self._begun.pop(event.session, None)) is None:
            return
        try:
            begun.stream.told(begun.turn, event, self._clock() - begun.start)
        except Exception as error:  # the others are told theirs
            log.exception("what a stream said was lost")
            begun.stream.fail(begun.turn, f"the server failed at this ({type(error).__name__}); it was left out.")

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


def _do(job: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
