"""StreamingEngine: many live sessions on one model, one batch per step. They share forward passes, not state.

offer(a, frame)  offer(b, frame)          frames wait, the newest of a session wins
step()                                    one batch of all sessions with a frame waiting -> events
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.loading import sentence_of
from casa.streaming.batch import ShouldStop, StepRequest, run_isolated
from casa.streaming.pacing import Clock, TimeBudget
from casa.streaming.session import StepFrame, StreamingSession

log = logging.getLogger("casa.streaming")


@dataclass(frozen=True)
class SessionEvent:
    """What a step gave a session: text ("" if it had nothing to say), or why there is none.

    Args:
        session: Its name.
        kind: What the text is.
        tag: The caller's own, as given with the frame or question.
        text: The caption or answer.
        error: A sentence, where something failed.
        complete: False if time cut the text.
        lag: Seconds since the frame or question came.
        latency: Seconds since its turn began.
    """

    session: str
    kind: Literal["caption", "answer"]
    tag: object
    text: str = ""
    error: str | None = None
    complete: bool = True
    lag: float = 0.0
    latency: float = 0.0


@dataclass(frozen=True)
class _Turn:
    """A frame or a question in line, and then in its steps."""

    seat: "_Seat"
    kind: Literal["caption", "answer"]
    prepare: Callable[[ShouldStop], StepRequest]
    tag: object
    arrived: float
    since: float  # when the first of the frames came that have replaced one another, and then when the turn began
    budget: ShouldStop = lambda: False  # of its words, over all steps that it takes
    request: StepRequest | None = None  # by which it goes on, where a step has yielded in its middle

    def begin(self, should_stop: ShouldStop | None) -> StepRequest:
        """What the session feeds. Raises whatever the session raises."""

        def stops() -> bool:
            return self.budget() or (should_stop is not None and should_stop())

        return self.prepare(stops) if self.request is None else replace(self.request, should_stop=stops)


@dataclass
class _Seat:
    session: StreamingSession
    caption_seconds: float
    answer_seconds: float
    half: _Turn | None = None  # what a step that yielded has left
    frame: _Turn | None = None
    questions: deque[_Turn] = field(default_factory=deque)
    dropped: int = 0
    paused: bool = False

    @property
    def next(self) -> _Turn | None:
        return self.half or (self.questions[0] if self.questions else self.frame)

    def take(self, clock: Clock) -> _Turn | None:
        """The next turn, which waits no more."""
        if (turn := self.next) is None or turn is self.half:
            self.half = None
            return turn
        if turn is self.frame:
            self.frame = None
        else:
            self.questions.popleft()
        seconds = self.caption_seconds if turn.kind == "caption" else self.answer_seconds
        return replace(turn, since=clock(), budget=TimeBudget(clock, seconds))


class StreamingEngine:
    """Sessions by name. All methods may be called from any thread while another one steps.

    Args:
        model: Shared by all sessions.
        processor: The model's own.
        max_sessions: More are refused.
        max_batch_size: Sessions in one step; the rest have their turn in the next one.
        max_questions: Of one session that wait for their answers; more are refused.
        clock: Seconds, by which turns are timed.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        *,
        max_sessions: int = 64,
        max_batch_size: int = 16,
        max_questions: int = 16,
        clock: Clock = time.monotonic,
    ) -> None:
        if max_sessions < 1 or max_batch_size < 1 or max_questions < 1:
            raise UserError("max_sessions, max_batch_size and max_questions are 1 or more.")
        self.model, self.processor, self._clock = model, processor, clock
        self.max_sessions, self.max_batch_size, self.max_questions = max_sessions, max_batch_size, max_questions
        self._seats: dict[str, _Seat] = {}
        self._in_step: set[str] = set()
        self._lock = threading.RLock()
        self._stepping = threading.Lock()

    def __len__(self) -> int:
        return len(self._seats)

    def __contains__(self, name: str) -> bool:
        return name in self._seats

    def open(
        self,
        name: str,
        session: StreamingSession | None = None,
        *,
        caption_seconds: float = math.inf,
        answer_seconds: float = math.inf,
        **settings: Any,
    ) -> StreamingSession:
        """Opens a session.

        Args:
            name: What it is called from now on.
            session: One that was made, loaded or forked elsewhere; None makes a new one.
            caption_seconds: The most that one caption may take from its first token on.
            answer_seconds: The same for an answer.
            **settings: `StreamingSession`'s, of a new one.

        Raises:
            UserError: The name is taken, or the engine is full.
        """
        with self._lock:
            self._check_seat(name)
        made = session if session is not None else StreamingSession(self.model, self.processor, **settings)
        with self._lock:
            self._check_seat(name)
            self._seats[name] = _Seat(made, caption_seconds, answer_seconds)
        return made

    def close(self, name: str) -> None:
        """Ends a session and frees its state; what it is just saying is not reported any more."""
        with self._lock:
            self._seat(name)
            del self._seats[name]

    def pause(self, name: str, paused: bool = True) -> None:
        """A paused session watches nothing and still answers: frames that wait, or come meanwhile, are passed over."""
        with self._lock:
            seat = self._seat(name)
            seat.paused, seat.frame = paused, None

    def session(self, name: str) -> StreamingSession:
        return self._seat(name).session

    def fork(self, name: str, twin: str) -> StreamingSession:
        """A second session that goes on from where the first one is."""
        with self._stepping:
            return self.open(twin, self.session(name).fork())

    def save(self, name: str, path: str | Path) -> None:
        """Saves a session; `open` takes what `StreamingSession.load` makes of the file."""
        with self._stepping:
            self.session(name).save(path)

    def offer(self, name: str, frame: StepFrame, tag: object = None, arrived: float | None = None) -> bool:
        """Hands a session its next frame.

        Args:
            name: Of the session.
            frame: As for `step`, or what its `encode` made of one, in any thread, ahead of its turn.
            tag: Comes back with the event.
            arrived: When the frame came, by the engine's clock; now if left out.

        Returns:
            False if one was waiting still, which is dropped and counted.
        """
        now = self._clock() if arrived is None else arrived
        with self._lock:
            seat = self._seat(name)
            if seat.paused:
                return True
            late, prepare = seat.frame, partial(seat.session.prepare, frame)
            seat.dropped += late is not None
            seat.frame = _Turn(seat, "caption", prepare, tag, now, now if late is None else late.since)
            return late is None

    def ask(self, name: str, question: str, tag: object = None) -> None:
        """Has a question answered before the session's next frame; each takes a turn, in the order asked.

        Raises:
            UserError: Too many wait already.
        """
        now = self._clock()
        with self._lock:
            seat = self._seat(name)
            if len(seat.questions) >= self.max_questions:
                raise UserError(f"{len(seat.questions)} questions wait for their answers; ask again later.")
            prepare = partial(seat.session.prepare_question, question)
            seat.questions.append(_Turn(seat, "answer", prepare, tag, now, now))

    def forget(self, name: str) -> bool:
        """Drops what waits in a session, or is half said; its state is as before that. False if there was nothing."""
        with self._lock:
            seat = self._seat(name)
            waited = seat.next is not None
            seat.half, seat.frame = None, None
            seat.questions.clear()
            return waited

    def dropped(self, name: str) -> int:
        """Frames that were replaced before they had their turn."""
        return self._seat(name).dropped

    @property
    def waiting(self) -> int:
        """Sessions with something to do."""
        with self._lock:
            return sum(seat.next is not None for seat in self._seats.values())

    @property
    def is_crowded(self) -> bool:
        """Whether something that is half said has no place in the step under way."""
        with self._lock:
            return any(seat.half is not None and name not in self._in_step for name, seat in self._seats.items())

    def waiting_since(self) -> dict[str, float]:
        """Since when those wait that have something to do, have not begun, and are not in the step under way."""
        with self._lock:
            waiting = {name: seat.next for name, seat in self._seats.items() if name not in self._in_step}
            return {name: turn.since for name, turn in waiting.items() if turn is not None and turn.request is None}

    def step(
        self,
        should_stop: ShouldStop | None = None,
        should_yield: ShouldStop | None = None,
        on_event: Callable[[SessionEvent], None] | None = None,
    ) -> list[SessionEvent]:
        """One batch of the sessions that have a question or a frame waiting, those that waited longest first.

        Whatever fails in a turn is that session's event, and the session then is as it was before.

        Args:
            should_stop: Asked before every token; once it says True, all captions end where they are.
            should_yield: Asked after every pass; once it says True, the step ends. What is half said goes on in the
                next one; until it is said, its session is as it was before, also for `save` and `fork`.
            on_event: Called with each event as soon as it is there, while others are half said still.
        """
        with self._stepping:
            turns = self._take_turns()
            events: dict[str, SessionEvent] = {}
            requests: dict[str, StepRequest] = {}

            def end(name: str, text: str = "", error: Exception | str | None = None, complete: bool = True) -> None:
                turn, now = turns[name], self._clock()
                if isinstance(error, Exception):
                    log.error("a turn of session %r failed", name, exc_info=error)
                    error = f"the model failed at this ({type(error).__name__}); it was left out."
                with self._lock:
                    self._in_step.discard(name)
                    # a session that was closed meanwhile is told nothing, nor is a new one of its name
                    if self._seats.get(name) is not turn.seat:
                        return
                lag, latency = now - turn.arrived, now - turn.since
                events[name] = SessionEvent(name, turn.kind, turn.tag, text, error, complete, lag, latency)
                if on_event is not None:
                    on_event(events[name])

            for name, turn in turns.items():
                try:
                    requests[name] = turn.begin(should_stop)
                except (ValueError, TypeError) as error:  # no picture, or no room for the question: words for the user
                    end(name, error=sentence_of(error))
                except Exception as error:
                    end(name, error=error)
            names = list(requests)
            for row, found in run_isolated(self.model, list(requests.values()), should_yield):
                name, seat = names[row], turns[names[row]].seat
                if isinstance(found, StepRequest):
                    seat.half = replace(turns[name], request=found)
                elif isinstance(found, Exception):
                    end(name, error=found)
                else:
                    try:
                        text = seat.session.accept(found)
                    except Exception as error:
                        end(name, error=error)
                    else:
                        end(name, text, complete=found.complete)
            self._in_step = set()
            return [events[name] for name in turns if name in events]

    def _take_turns(self) -> dict[str, _Turn]:
        turns = {}
        with self._lock:
            for name, seat in list(self._seats.items()):
                if len(turns) < self.max_batch_size and (turn := seat.take(self._clock)) is not None:
                    # who had a turn goes to the end of the line
                    self._seats[name] = self._seats.pop(name)
                    turns[name] = turn
            self._in_step = set(turns)
        return turns

    def _seat(self, name: str) -> _Seat:
        if name not in self._seats:
            raise UserError(f"there is no session {name!r}; open it first.")
        return self._seats[name]

    def _check_seat(self, name: str) -> None:
        if name in self._seats:
            raise UserError(f"there is a session {name!r} already; choose another name.")
        if len(self._seats) >= self.max_sessions:
            raise UserError(f"all {self.max_sessions} sessions are taken; close one first.")
