"""Where captions go: files as they are said, a recording as it is watched, at the end whatever needs all of them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from casa.captioning.request import Request
from casa.media import (
    CaptionFile,
    CaptionList,
    Recorder,
    VideoWriter,
    add_subtitle_track,
    burn_captions,
    check_subtitle_track,
    read_captions,
)


def check_outputs(request: Request) -> None:
    """That all outputs can be made, before anything is watched for hours. Raises UserError."""
    if request.burn is not None:
        # what it encodes with is there
        VideoWriter(request.burn, (2, 2), 1.0)
    if request.track is not None:
        check_subtitle_track(request.path, request.track)


class Outputs:
    """All outputs of a request; to be used in a `with`.

    until: when a run goes on, captions on disk from this second on are dropped (None: all are kept).
    """

    def __init__(self, request: Request, resumed: bool = False, until: float | None = None) -> None:
        self._request, self._hold = request, request.hold
        with ExitStack() as stack:
            self._files = [stack.enter_context(CaptionFile(path, resumed, until)) for path in request.out]
            self._stack = stack.pop_all()
        again = request.can_be_read_again
        self._afterwards = again and (request.burn is not None or request.track is not None)
        self._recorder = None
        if request.burn is not None and not again:
            # in time with the caption files, which a run that is gone on with had begun before
            self._recorder = Recorder(request.burn, request.fps, begin=None if resumed else 0.0)
        self._all = CaptionList()
        if resumed and self._afterwards:
            for known in read_captions(request.out[0]):
                self._all.say(known.start, known.end, known.text)

    @property
    def records(self) -> bool:
        """Whether frames are recorded on their way; then they must not run ahead of what is said of them."""
        return self._recorder is not None

    @property
    def recording(self) -> Path | None:
        """Where the frames were recorded, if they were."""
        return None if self._recorder is None else self._recorder.place

    def recorded(self, frames: Iterable[Any]) -> Iterator[Any]:
        """The frames on their way to the session."""
        return iter(frames) if self._recorder is None else self._recorder.through(frames)

    def say(self, at: float, seconds: float, text: str, lag: float | None = None) -> None:
        """at: when, on the clock of the captions; seconds: on the source's own. lag: by which live text came later."""
        self.say_again(at, text, lag)
        if self._recorder is not None:
            self._recorder.say(seconds, seconds + self._hold, text)

    def say_again(self, at: float, text: str, lag: float | None = None) -> None:
        """What an earlier run said of a frame that does not come again."""
        for file in self._files:
            file.say(at, at + self._hold, text, lag)
        if self._afterwards:
            self._all.say(at, at + self._hold, text)

    def close(self, duration: float | None) -> None:
        """Closes the files. duration: seconds of the whole, where it has an end."""
        end = duration if duration is not None and math.isfinite(duration) else None
        for written in (*self._files, self._all):
            written.close(end)
        if self._recorder is not None:
            self._recorder.close()

    def make_videos(self) -> None:
        """Writes the videos that need all captions."""
        request = self._request
        if self._afterwards and request.burn is not None:
            burn_captions(request.path, self._all.captions, request.burn, fps=request.fps)
        if self._afterwards and request.track is not None:
            add_subtitle_track(request.path, self._all.captions, request.track)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._recorder is not None:
            # what was recorded until a camera broke off is kept; and that it broke off is told, whatever comes of this
            with suppress(Exception):
                self._recorder.close()
        self._stack.close()
