"""Where a run is, saved beside its caption files as it goes: one file, the session's state with its place in the notes.

A state is written after the captions that it knows of, so whatever moment a run is killed at, the files hold at least
what the state has said. What they hold from its last frame on is said again, in the same words: by the state what it
knows was said of that frame, by the session the rest.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from casa.captioning.request import Request
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import StreamingSession

HALF = 0.0005  # s: caption files have whole milliseconds


@dataclass
class Place:
    """seconds: of the last frame that was watched; None before the first. asked: questions asked so far.

    began: what the clock on the wall (Unix time) said at second 0, by which a live stream goes on.
    said: each caption and answer written of that frame: the second at which it stands, its text, its lag.
    cue: the second at which the last caption of all stands.
    """

    seconds: float | None = None
    asked: int = 0
    began: float | None = None
    said: list[tuple[float, str, float | None]] = field(default_factory=list)
    cue: float | None = None

    @property
    def until(self) -> float:
        """Captions on disk from this second on will be said again."""
        if self.said:
            return round(self.said[0][0], 3) - HALF
        return -math.inf if self.cue is None else round(self.cue, 3) + HALF


class Progress:
    """The place of a run, and its state on disk.

    model: its name. wall: Unix time, clock: seconds that only rise; for tests.
    Raises UserError if the state to resume from is of another run.
    """

    def __init__(
        self,
        request: Request,
        model: str,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request, self._identity = request, request.identity(model)
        self._wall, self._clock = wall, clock
        self._path = request.state
        self._saved_at = -math.inf
        self.place = Place()
        self.resumed = request.resume and self._path is not None and self._path.exists()
        if self._path is not None and self.resumed:
            notes = StreamingSession.saved_notes(self._path)
            _check_same(self._path, notes.get("run", {}), self._identity)
            self.place = Place(**notes["place"])
        elif self._path is not None:
            # of some earlier run: what is written from now on is not what it knows of
            self._path.unlink(missing_ok=True)
        self._said_at, self._said = self.place.seconds, list(self.place.said)

    def session(self, model: CasaForConditionalGeneration, processor: CasaProcessor) -> StreamingSession:
        """The session that goes on, or a new one."""
        request = self._request
        if self._path is not None and self.resumed:
            return StreamingSession.load(self._path, model, processor)
        return StreamingSession(
            model,
            processor,
            prompt=request.prompt,
            max_text_tokens=request.max_text_tokens,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            seed=request.seed,
        )

    def offset(self, is_live: bool) -> float:
        """Seconds to add to what the source says: 0, but for a live stream that is gone on with."""
        if not is_live or self.place.seconds is None or self.place.began is None:
            self.place.began = self._wall()
            return 0.0
        return max(self._wall() - self.place.began, self.place.seconds + 0.001)

    def at(self, seconds: float) -> float:
        """Where a caption of that second stands: never before the last one, since a frame may come late."""
        return seconds if self.place.cue is None else max(seconds, self.place.cue)

    def say(self, seconds: float, at: float, text: str, lag: float | None = None) -> None:
        """Something has been written of the frame at `seconds`, and stands `at` a second, on the captions' clock."""
        if seconds != self._said_at:
            self._said_at, self._said = seconds, []
        self._said.append((at, text, lag))
        self.place.cue = at

    def reached(self, seconds: float, asked: int, session: StreamingSession) -> None:
        """A frame has been watched and what was said of it written."""
        self.place.seconds, self.place.asked = seconds, asked
        self.place.said = list(self._said) if self._said_at == seconds else []
        if self._clock() - self._saved_at >= self._request.save_every:
            self.save(session)

    def save(self, session: StreamingSession) -> None:
        if self._path is not None and self.place.seconds is not None:
            session.notes = {"run": self._identity, "place": asdict(self.place)}
            session.save(self._path)
        self._saved_at = self._clock()

    def finish(self) -> None:
        """All is said and written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _check_same(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    other = [name for name, value in now.items() if then.get(name) != value]
    if other:
        names = ", ".join(name.replace("_", "-") for name in other)
        raise UserError(f"{path} is of a run with another {names}; give what that run was given, or no --resume.")
