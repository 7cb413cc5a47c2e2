"""StreamingEngine: many live sessions on one model, one batch per step.

Sessions join and leave at any time, and each says what it would say alone: they share forward passes, not state. A
frame that is no picture, a failure or a budget that is spent shows in that session's own event and nowhere else.

    offer(a, frame)  offer(b, frame)          frames wait, the newest of a session wins
    step()                                    one pass over all sessions with a frame waiting -> events

A step can be halted: what is half said then goes on in the next one, beside the frames that have come meanwhile.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.loading import sentence_of
from casa.streaming.session import StreamingSession
from casa.streaming.together import Call, Said, run_each

log = logging.getLogger("casa.streaming")

Cut = Callable[[], bool]


@dataclass(frozen=True)
class Event:
    """What a step gave a session: text ("" if it had nothing to say), or why there is none.

    kind: "caption" or "answer". whole: False if time cut it.
    """

    session: str
    kind: str
    text: str = ""
    error: str | None = None
    whole: bool = True


@dataclass
class _Seat:
    session: StreamingSession
    half: "_Turn | None" = None  # what a step that was halted has left
    frame: Any = None
    questions: deque[str] = field(default_factory=deque)
    dropped: int = 0
    paused: bool = False

    @property
    def waits(self) -> bool:
        return self.half is not None or bool(self.questions) or (self.frame is not None and not self.paused)


@dataclass(frozen=True)
class _Turn:
    """What a session is given in one step: a frame, a question, or the call by which one of these goes on."""

    name: str
    seat: _Seat
    kind: str
    given: Any

    def call(self, cut: Cut | None) -> Call | Event:
        """What the session feeds; the event at once if it cannot."""
        if isinstance(self.given, Call):
            return replace(self.given, cut=cut)
        prepare = self.seat.session.prepare if self.kind == "caption" else self.seat.session.prepare_question
        try:
            return prepare(self.given, cut)
        except (ValueError, TypeError) as error:  # no picture, or no room for the question: words for the user
            return Event(self.name, self.kind, error=sentence_of(error))
        except Exception as error:
            return self.failed(error)

    def event(self, said: Said | Exception) -> Event:
        """What the pass came to, taken over by the session."""
        if isinstance(said, Exception):
            return self.failed(said)
        try:
            return Event(self.name, self.kind, self.seat.session.accept(said), whole=said.whole)
        except Exception as error:
            return self.failed(error)

    def failed(self, error: Exception) -> Event:
        log.error("a turn of session %r failed", self.name, exc_info=error)
        sentence = f"the model failed at this ({type(error).__name__}); it was left out."
        return Event(self.name, self.kind, error=sentence)


class StreamingEngine:
    """Sessions by name. `offer` and `ask` may be called from any thread while another one steps.

    most_sessions: more are refused. most_rows: sessions in one pass; the rest have their turn in the next one.
    most_questions: of one session that wait for their answers; more are refused.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        *,
        most_sessions: int = 64,
        most_rows: int = 16,
        most_questions: int = 16,
    ) -> None:
        if most_sessions < 1 or most_rows < 1 or most_questions < 1:
            raise UserError("most_sessions, most_rows and most_questions are 1 or more.")
        self.model, self.processor = model, processor
        self.most_sessions, self.most_rows, self.most_questions = most_sessions, most_rows, most_questions
        self._seats: dict[str, _Seat] = {}
        self._lock = threading.RLock()
        self._stepping = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._seats)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._seats

    def open(self, name: str, session: StreamingSession | None = None, **settings: Any) -> StreamingSession:
        """A new session of that name, with StreamingSession's settings; or `session`, loaded or forked elsewhere.

        Raises UserError if the name is taken or the engine is full.
        """
        with self._lock:
            self._check_seat(name)
        made = session if session is not None else StreamingSession(self.model, self.processor, **settings)
        with self._lock:
            self._check_seat(name)
            self._seats[name] = _Seat(made)
        return made

    def close(self, name: str) -> None:
        """Ends a session and frees its state; what it is just saying is not reported any more."""
        with self._lock:
            self._seat(name)
            del self._seats[name]

    def pause(self, name: str, paused: bool = True) -> None:
        """A paused session watches nothing and still answers; frames offered meanwhile replace one another."""
        with self._lock:
            self._seat(name).paused = paused

    def session(self, name: str) -> StreamingSession:
        with self._lock:
            return self._seat(name).session

    def fork(self, name: str, twin: str) -> StreamingSession:
        """A second session that goes on from where the first one is."""
        with self._stepping:
            return self.open(twin, self.session(name).fork())

    def save(self, name: str, path: str | Path) -> None:
        with self._stepping:
            self.session(name).save(path)

    def load(self, name: str, path: str | Path) -> StreamingSession:
        return self.open(name, StreamingSession.load(path, self.model, self.processor))

    def offer(self, name: str, frame: Any) -> bool:
        """Hands a session its next frame, or what its `look` made of one, in any thread, ahead of its turn.

        False if one was waiting still, which is dropped and counted.
        """
        with self._lock:
            seat = self._seat(name)
            late = seat.frame is not None
            seat.dropped += late
            seat.frame = frame
            return not late

    def ask(self, name: str, question: str) -> None:
        """Has a question answered before the session's next frame; each takes a turn, in the order asked.

        Raises UserError if too many wait already.
        """
        with self._lock:
            questions = self._seat(name).questions
            if len(questions) >= self.most_questions:
                raise UserError(f"{len(questions)} questions of session {name!r} wait for answers; ask again later.")
            questions.append(question)

    def forget(self, name: str) -> None:
        """Drops what waits in a session, or is half said; its state is as it was before that."""
        with self._lock:
            seat = self._seat(name)
            seat.half, seat.frame = None, None
            seat.questions.clear()

    def dropped(self, name: str) -> int:
        """Frames that were replaced before they had their turn."""
        with self._lock:
            return self._seat(name).dropped

    @property
    def waiting(self) -> int:
        """Sessions with something to do."""
        with self._lock:
            return sum(seat.waits for seat in self._seats.values())

    def step(
        self,
        cut: Cut | None = None,
        cuts: Mapping[str, Cut] | None = None,
        halt: Callable[[], bool] | None = None,
        tell: Callable[[Event], None] | None = None,
    ) -> list[Event]:
        """One pass over the sessions that have a question or a frame waiting, those that waited longest first.

        cut: asked before every token; once it says True, all captions end where they are. cuts: of some sessions, by
        name, asked in its place; it ends the caption of that session, and the others go on.
        halt: asked after every token; once it says True, the step ends. What is half said goes on in the next one, by
        that one's cuts; until it is said, its session is as it was before, also for `save` and `fork`.
        tell: called with each event as soon as it is there, others being half said still.
        Whatever fails in a turn is that session's event, and the session then is as it was before.
        """
        with self._stepping:
            turns = self._take_turns()
            calls: dict[int, Call] = {}
            events: dict[int, Event] = {}

            def end(at: int, event: Event) -> None:
                with self._lock:
                    # who has gone meanwhile, or come anew under the same name, is told nothing
                    if self._seats.get(turns[at].name) is not turns[at].seat:
                        return
                events[at] = event
                if tell is not None:
                    tell(event)

            for at, turn in enumerate(turns):
                call = turn.call((cuts or {}).get(turn.name, cut))
                if isinstance(call, Call):
                    calls[at] = call
                else:
                    end(at, call)
            places = list(calls)
            for row, found in run_each(self.model, list(calls.values()), halt):
                at = places[row]
                if isinstance(found, Call):
                    turns[at].seat.half = replace(turns[at], given=found)
                else:
                    end(at, turns[at].event(found))
            return [events[at] for at in sorted(events)]

    def _take_turns(self) -> list[_Turn]:
        turns = []
        with self._lock:
            for name, seat in list(self._seats.items()):
                if not seat.waits or len(turns) == self.most_rows:
                    continue
                # who had a turn goes to the end of the line
                self._seats[name] = self._seats.pop(name)
                if seat.half is not None:
                    turns.append(seat.half)
                    seat.half = None
                elif seat.questions:
                    turns.append(_Turn(name, seat, "answer", seat.questions.popleft()))
                else:
                    turns.append(_Turn(name, seat, "caption", seat.frame))
                    seat.frame = None
        return turns

    def _seat(self, name: str) -> _Seat:
        if name not in self._seats:
            raise UserError(f"there is no session {name!r}; open it first.")
        return self._seats[name]

    def _check_seat(self, name: str) -> None:
        if name in self._seats:
            raise UserError(f"there is a session {name!r} already; choose another name.")
        if len(self._seats) >= self.most_sessions:
            raise UserError(f"all {self.most_sessions} sessions are taken; close one first.")
