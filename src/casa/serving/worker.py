"""The model's own thread: everything that computes happens here, so that nothing on the model meets another thread.

    readers' tasks --offer, ask--> LiveStreams --+
    routes --call--> short jobs ---------------- +--> one thread: jobs, a step over all streams, a slice of one chat
    routes --chat--> completions ----------------+

It sleeps until something waits. A step is cut at its budget, the longest among the streams that take part, so that
nobody's caption is shortened by a stream that asks for more frames a second. Streams have a turn after every slice.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any, Protocol

from casa.errors import UserError
from casa.serving.limits import Limits
from casa.serving.live import LiveStream, Ticket, Turn
from casa.streaming import StreamingEngine

CHAT_SECONDS = 0.05  # that one completion may take before streams and other completions have their turn

STOPPING = UserError("the server is stopping; try again later.")

log = logging.getLogger("casa.serving")


class Work(Protocol):
    """Something long that is done in slices."""

    def advance(self, until: float) -> bool:
        """Works until that moment of the monotonic clock, or a little longer; True once all is done."""
        ...

    def fail(self, error: Exception) -> None: ...


class Worker:
    """Runs an engine. All methods but `run`'s own may be called from any thread."""

    def __init__(self, engine: StreamingEngine, limits: Limits) -> None:
        self.engine, self._limits = engine, limits
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
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
        """Gives a stream a session with these settings. The future raises UserError if they are wrong."""

        def job() -> None:
            stream.session = self.engine.open(stream.name, **settings)
            stream.measure()
            with self._wake:
                self._streams[stream.name] = stream

        return self.call(job)

    def close(self, stream: LiveStream) -> "Future[Any]":
        """Ends a stream, also one whose opening is still under way, and frees its state."""

        def job() -> None:
            with self._wake:
                self._streams.pop(stream.name, None)
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
        with self._wake:
            stream.drop()

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
            or any(stream.waits for stream in self._streams.values())
        )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._stopping:
                    return
                jobs = list(self._jobs)
                self._jobs.clear()
            for job, future in jobs:
                _do(job, future)
            with self._wake:
                turns = self._turns()
            try:
                if turns:
                    self._step(turns)
                self._advance_chat()
            except Exception:  # whatever it was, the other streams go on
                log.exception("the model's thread met an error")

    def _turns(self) -> dict[str, tuple[LiveStream, Turn]]:
        """One turn for each stream that waits, as many as fit in a pass; who had one goes to the end of the line."""
        turns: dict[str, tuple[LiveStream, Turn]] = {}
        for name, stream in list(self._streams.items()):
            if len(turns) < self.engine.most_rows and (turn := stream.take()) is not None:
                self._streams[name] = self._streams.pop(name)
                turns[name] = (stream, turn)
        return turns

    def _step(self, turns: dict[str, tuple[LiveStream, Turn]]) -> None:
        for name, (_, turn) in turns.items():
            if turn.ticket is not None:
                self.engine.offer(name, turn.ticket.picture)
            else:
                self.engine.ask(name, turn.question)
        start = monotonic()
        end = start + max(stream.budget(turn, self._limits) for stream, turn in turns.values())
        try:
            events = self.engine.step(cut=lambda: monotonic() > end)
        except Exception as error:
            # the engine answers for its sessions; whatever this was, their states are as they were
            log.exception("a step over %d streams failed", len(turns))
            for stream, turn in turns.values():
                stream.fail(turn, f"the model failed at this ({type(error).__name__}); it was left out.")
            return
        seconds = monotonic() - start
        for event in events:
            stream, turn = turns[event.session]
            try:
                stream.told(turn, event, seconds)
            except Exception as error:  # the others are told theirs
                log.exception("what a stream said was lost")
                stream.fail(turn, f"the server failed at this ({type(error).__name__}); it was left out.")

    def _advance_chat(self) -> None:
        """A slice of the completion that has waited longest."""
        with self._wake:
            chat = self._chats.popleft() if self._chats else None
        if chat is None:
            return
        try:
            done = chat.advance(monotonic() + CHAT_SECONDS)
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
