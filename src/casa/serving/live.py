"""One live stream as the model's thread sees it: what waits to be watched or answered, and what is told its reader.

The newest frame wins: one that is replaced before its turn is dropped and counted, so that lag cannot build up.
Questions wait in line and come before frames. All methods but `told` are called with the worker's lock held.
"""

from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from PIL import Image

from casa.serving.baseline import InsertionTally
from casa.serving.limits import Limits
from casa.serving.load import STREAM_SECONDS, Recent, slow_sentence
from casa.serving.metrics import Metrics
from casa.serving.outbox import Outbox
from casa.serving.transcript import Transcript
from casa.streaming import Event, StreamingSession
from casa.streaming.pacing import Clock


@dataclass(frozen=True)
class Ticket:
    """A frame in line. number: counted from 1, as sent. time: in the video, in seconds. arrived: monotonic."""

    number: int
    time: float
    picture: Image.Image
    arrived: float = field(default_factory=monotonic)


@dataclass(frozen=True)
class Turn:
    """What a stream is given at once: a frame or a question."""

    kind: str  # as in Event: "caption" or "answer"
    ticket: Ticket | None = None
    question: str = ""
    arrived: float = 0.0


class LiveStream:
    """fps: frames a second that it means to send; a caption is cut 1 / fps seconds after its first token.

    dropped, cut: frames that were not watched, and captions and answers that time cut, so far. cache_bytes: what its
    session held after its last turn.
    """

    def __init__(
        self,
        name: str,
        fps: float,
        outbox: Outbox,
        transcript: Transcript,
        metrics: Metrics,
        load: Recent | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """load: where what became of frames is counted, for all streams together."""
        self.name, self.fps, self.outbox, self.transcript = name, fps, outbox, transcript
        self._metrics, self._clock = metrics, clock
        self._recent = [Recent(STREAM_SECONDS, clock), *([] if load is None else [load])]
        self.session: StreamingSession | None = None
        self.tally: InsertionTally | None = None
        self.paused = False
        self.dropped = self.cut = 0
        self.cache_bytes = 0
        self._ticket: Ticket | None = None
        self._came = 0.0  # since when a frame waits, the same one or those that replaced it
        self._questions: deque[tuple[str, float]] = deque()
        self._place = 0.0  # where in the video the last frame stood

    @property
    def waits(self) -> bool:
        return self.waits_since is not None

    @property
    def waits_since(self) -> float | None:
        """Since when something waits; None if nothing does."""
        if self._questions:
            return self._questions[0][1]
        return self._came if self._ticket is not None and not self.paused else None

    @property
    def questions(self) -> int:
        return len(self._questions)

    def offer(self, ticket: Ticket) -> None:
        if self.paused:
            return
        if self._ticket is not None:
            self.drop()
        else:
            self._came = ticket.arrived
        self._ticket = ticket

    def drop(self, *, late: bool = True) -> None:
        """Counts a frame that will not be watched. late: for want of time."""
        self.dropped += 1
        if late:
            self._count("dropped")
        self._metrics.count("dropped")
        self.outbox.put({"type": "dropped", "count": self.dropped})

    def pause(self, paused: bool) -> None:
        """A paused stream watches nothing and still answers."""
        self.paused = paused
        if paused:
            self._ticket = None

    def ask(self, question: str) -> None:
        self._questions.append((question, self._clock()))

    def take(self) -> Turn | None:
        """The next turn, if anything waits."""
        if self._questions:
            question, arrived = self._questions.popleft()
            return Turn("answer", question=question, arrived=arrived)
        if self._ticket is not None and not self.paused:
            ticket, self._ticket = self._ticket, None
            return Turn("caption", ticket, arrived=ticket.arrived)
        return None

    def budget(self, turn: Turn, limits: Limits) -> float:
        """Seconds that this turn's words may take, from the first one on."""
        return limits.answer_seconds if turn.kind == "answer" else min(1 / self.fps, limits.caption_seconds)

    def patience(self, limits: Limits) -> float:
        """Seconds that it waits while others speak: half the time of a caption, so that it is in time for the next."""
        return min(1 / self.fps, limits.caption_seconds) / 2

    def told(self, turn: Turn, event: Event, seconds: float) -> None:
        """Passes on what a turn came to. seconds: how long it took. On the model's thread, as soon as it is there."""
        lag = self._clock() - turn.arrived
        self.measure()
        if not event.whole:
            self.cut += 1
            self._metrics.count("cut")
            self._count("cut")
        if event.error is not None:
            self.fail(turn, event.error)
        elif turn.ticket is not None:
            self._caption(turn.ticket, event, lag, seconds)
        else:
            self._metrics.count("answers")
            if self.tally is not None:
                self.tally.answer(turn.question, event.text)
            self.outbox.put(
                {
                    "type": "answer",
                    "question": turn.question,
                    "text": event.text,
                    "time": self._place,
                    "lag": round(lag, 4),
                    "whole": event.whole,
                }
            )

    def fail(self, turn: Turn, sentence: str) -> None:
        """Says that a turn came to nothing."""
        self._metrics.count("errors")
        about = {} if turn.ticket is None else {"frame": turn.ticket.number}
        self.outbox.put({"type": "error", "message": sentence, "fatal": False, **about})

    def measure(self) -> None:
        """Notes what the session holds, for whoever asks from another thread."""
        self.cache_bytes = 0 if self.session is None else self.session.usage.cache_bytes

    def _caption(self, ticket: Ticket, event: Event, lag: float, seconds: float) -> None:
        self._place = ticket.time
        self._metrics.count("frames")
        self._count("watched")
        self._metrics.observe(lag)
        about = {"frame": ticket.number, "time": ticket.time, "lag": round(lag, 4)}
        if event.text:
            self._metrics.count("captions")
            self.transcript.add(ticket.time, event.text, lag)
            self.outbox.put({"type": "caption", **about, "text": event.text, "whole": event.whole})
        counts = {"whole": event.whole, "dropped": self.dropped, "cut": self.cut}
        counts["advice"] = slow_sentence(self.fps, self._recent[0])
        self.outbox.put({"type": "usage", **about, **self._usage(event, seconds), **counts})

    def _count(self, kind: str) -> None:
        for recent in self._recent:
            recent.count(kind)

    def _usage(self, event: Event, seconds: float) -> dict[str, Any]:
        if self.session is None:
            return {}
        usage = self.session.usage
        insertion = None
        if self.tally is not None:
            insertion = self.tally.frame(usage.image_tokens, event.text, seconds)
        return {
            "watched": self.session.frames,
            "latency": round(seconds, 4),
            "cache_bytes": usage.cache_bytes,
            "text_tokens": usage.text_tokens,
            "image_tokens": usage.image_tokens,
            "insertion": insertion,
        }
