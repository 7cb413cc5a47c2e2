"""What a run leaves on disk: captions as they are said, a recording, videos made of all captions, and its state.

The state is written after the captions that it knows of, so whatever moment a run is killed at, the files hold at least
what the state has said. What they hold from its last frame on is said again, in the same words: by the state what it
knows was said of that frame, by the session the rest.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from casa.captioning.request import CaptionRequest
from casa.errors import UserError
from casa.media import (
    CaptionFile,
    CaptionList,
    Frame,
    Recorder,
    VideoWriter,
    add_subtitle_track,
    burn_captions,
    check_subtitle_track,
    read_captions,
)
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import StreamingSession

HALF = 0.0005  # s: caption files have whole milliseconds


def check_outputs(request: CaptionRequest) -> None:
    """Checks that all outputs can be made, before anything is watched for hours. Raises UserError."""
    if request.burn is not None:
        # what it encodes with is there
        VideoWriter(request.burn, (2, 2), 1.0)
    if request.track is not None:
        check_subtitle_track(request.path, request.track)


class Outputs:
    """All outputs of a request; to be used in a `with`.

    Args:
        request: Where to.
        resumed: Whether a run is gone on with.
        until: Captions on disk from this second on are dropped then; None keeps all.
    """

    def __init__(self, request: CaptionRequest, resumed: bool = False, until: float | None = None) -> None:
        self._request = request
        with ExitStack() as stack:
            files = [stack.enter_context(CaptionFile(path, resumed, until)) for path in request.out]
            self._stack = stack.pop_all()
        self._written: list[CaptionList] = [*files]
        self._all: CaptionList | None = None
        self._recorder: Recorder | None = None
        if request.can_be_read_again and request.videos:
            self._all = CaptionList()
            self._written.append(self._all)
            for known in read_captions(request.out[0]) if resumed else ():
                self._all.say(known.start, known.end, known.text)
        elif request.burn is not None:
            # in time with the caption files, which a run that is gone on with had begun before
            self._recorder = Recorder(request.burn, request.fps, begin=None if resumed else 0.0)

    @property
    def records(self) -> bool:
        """Whether frames are recorded on their way; then they must not run ahead of what is said of them."""
        return self._recorder is not None

    @property
    def recording(self) -> Path | None:
        """Where the frames were recorded, if they were."""
        return None if self._recorder is None else self._recorder.place

    def recorded(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """The frames on their way to the session."""
        return iter(frames) if self._recorder is None else self._recorder.through(frames)

    def say(self, at: float, text: str, lag: float | None = None, seconds: float | None = None) -> None:
        """Writes a caption.

        Args:
            at: When it stands, on the clock of the captions.
            text: What it says.
            lag: Seconds by which live text came later than its picture.
            seconds: When it stands on the source's own clock; None if its frame does not come again.
        """
        for written in self._written:
            written.say(at, at + self._request.hold, text, lag)
        if self._recorder is not None and seconds is not None:
            self._recorder.say(seconds, seconds + self._request.hold, text)

    def close(self, duration: float | None) -> None:
        """Closes the files. duration: seconds of the whole, where it has an end."""
        end = duration if duration is not None and math.isfinite(duration) else None
        for written in self._written:
            written.close(end)
        if self._recorder is not None:
            self._recorder.close()

    def make_videos(self) -> None:
        """Writes the videos that need all captions."""
        request = self._request
        if self._all is None:
            return
        if request.burn is not None:
            burn_captions(request.path, self._all.captions, request.burn, fps=request.fps)
        if request.track is not None:
            add_subtitle_track(request.path, self._all.captions, request.track)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._recorder is not None:
            # what was recorded until a camera broke off is kept; and that it broke off is told, whatever comes of this
            with suppress(Exception):
                self._recorder.close()
        self._stack.close()


@dataclass
class Position:
    """Where a run is.

    Attributes:
        seconds: Of the last frame that was watched; None before the first.
        asked: Questions asked so far.
        began: What the clock on the wall (Unix time) said at second 0, by which a live stream goes on.
        said: Each caption and answer written of that frame: the second at which it stands, its text, its lag.
        cue: The second at which the last caption of all stands.
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


class RunState:
    """The position of a run, and its state on disk.

    Args:
        request: What is run.
        model: Its name.
        wall: Unix time.
        clock: Seconds that only rise.

    Raises:
        UserError: The state to resume from is of another run.
    """

    def __init__(
        self,
        request: CaptionRequest,
        model: str,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request, self._identity = request, request.identity(model)
        self._wall, self._clock = wall, clock
        self._path = request.out[0].with_name(request.out[0].name + ".state") if request.out else None
        self._saved_at = -math.inf
        self.position = Position()
        self.resumed = request.resume and self._path is not None and self._path.exists()
        if self._path is not None and self.resumed:
            notes = StreamingSession.saved_notes(self._path)
            other = [name for name, value in self._identity.items() if notes.get("run", {}).get(name) != value]
            if other:
                raise UserError(
                    f"{self._path} is of a run with another {', '.join(other)}; give what that run was given, "
                    "or leave out resume.",
                    field=(*other, "resume"),
                )
            self.position = Position(**notes["place"])
        else:
            # of some earlier run: what is written from now on is not what it knows of
            self.finish()
        self._said_at, self._said = self.position.seconds, list(self.position.said)

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
        position = self.position
        if not is_live or position.seconds is None or position.began is None:
            position.began = self._wall()
            return 0.0
        return max(self._wall() - position.began, position.seconds + 0.001)

    def at(self, seconds: float) -> float:
        """Where a caption of that second stands: never before the last one, since a frame may come late."""
        return seconds if self.position.cue is None else max(seconds, self.position.cue)

    def say(self, seconds: float, at: float, text: str, lag: float | None = None) -> None:
        """Notes what has been written of the frame at `seconds`, and stands `at` a second, on the captions' clock."""
        if seconds != self._said_at:
            self._said_at, self._said = seconds, []
        self._said.append((at, text, lag))
        self.position.cue = at

    def reached(self, seconds: float, asked: int, session: StreamingSession) -> None:
        """Notes that a frame has been watched and what was said of it written; saves, if it is time."""
        self.position.seconds, self.position.asked = seconds, asked
        self.position.said = list(self._said) if self._said_at == seconds else []
        if self._clock() - self._saved_at >= self._request.save_every:
            self.save(session)

    def save(self, session: StreamingSession) -> None:
        """Saves the session and its position, as one file beside the first caption file."""
        if self._path is not None and self.position.seconds is not None:
            session.notes = {"run": self._identity, "place": asdict(self.position)}
            session.save(self._path)
        self._saved_at = self._clock()

    def finish(self) -> None:
        """Removes the state: all is said and written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
