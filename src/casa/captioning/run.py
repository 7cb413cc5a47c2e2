"""One run: frames from a source, through a session, to captions that are on disk as soon as they are said."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

from casa.captioning.outputs import Outputs, RunState, check_outputs
from casa.captioning.request import CaptionRequest
from casa.errors import UserError
from casa.media import Backoff, Frame, VideoSource, open_source
from casa.media.streams import is_address
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import FrameCaption, StreamingSession, WatchCounts, watch, watch_live
from casa.streaming.pacing import TimeBudget

ANSWER_SECONDS = 5.0  # in live pace, the longest that an answer may take from its first word on
TOLERANCE = 1e-3  # s: what FFmpeg's clocks may be off
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class GracefulStop:
    """Inside a `with`, the first of `SIGNALS` raises KeyboardInterrupt in the main thread, the second ends the process.

    A signal that is ignored, as by nohup, stays so. What is being written is written first (`deferred`).

    Attributes:
        signal: The one that came, None if none has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deferred = self._due = False
        self._before: dict[int, signal._HANDLER] = {}

    @property
    def exit_status(self) -> int:
        """The exit status of a process that ends by that signal, as shells count it; Ctrl-C's if none came."""
        return 128 + (signal.SIGINT if self.signal is None else self.signal)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # no thread is waited for, and none of Python's own endings comes in between
            os._exit(self.exit_status)
        self.signal = number
        if self._deferred:
            self._due = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal waits: its KeyboardInterrupt is raised at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._due:
            self._due = False
            raise KeyboardInterrupt


@dataclass
class CaptionReport:
    """What happened in a run.

    Attributes:
        live: Whether it kept pace with the clock.
        count: Of its frames.
        said: Captions and answers.
        longest_lag: Of its frames, in s, and so are the others.
        damaged: Packets, frames and picture files.
        reconnects: Connections made after the first.
        stopped: By Ctrl-C, which is how live pace ends; the state is kept.
        recording: The video of what comes only once, if asked for.
        began: Whether it came to watching at all.
    """

    live: bool = False
    count: WatchCounts = field(default_factory=WatchCounts)
    said: int = 0
    longest_lag: float = 0.0
    total_lag: float = 0.0
    last_lag: float = 0.0
    damaged: int = 0
    reconnects: int = 0
    stopped: bool = False
    recording: Path | None = None
    began: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether every frame was watched, and whole."""
        return not (self.count.dropped or self.count.truncated or self.count.skipped or self.damaged or self.reconnects)

    def sentence(self) -> str:
        """All counts in one line."""
        count, frames = self.count, max(1, self.count.frames)
        told = [f"{count.frames} frames watched, {self.said} captions"]
        if self.live:
            lag = f"lag {self.total_lag / frames:.2f} s on average, {self.longest_lag:.2f} s at most"
            told += [
                f"{count.dropped} dropped",
                f"{count.truncated} cut short",
                f"{lag}, {self.last_lag:.2f} s at the end",
            ]
            if count.is_too_much:
                told.append("this machine is too slow for that: look at fewer frames a second, or at smaller pictures")
        told += [f"{count.skipped} no pictures"] if count.skipped else []
        told += [f"{self.damaged} damaged packets or frames"] if self.damaged else []
        told += [f"{self.reconnects} times connected again"] if self.reconnects else []
        return "; ".join(told) + "."


def caption(
    request: CaptionRequest,
    model: str,
    load: Callable[[str], tuple[CasaForConditionalGeneration, CasaProcessor]],
    on_caption: Callable[[float, str], object] = lambda at, text: None,
    *,
    report: CaptionReport | None = None,
    stop: GracefulStop | None = None,
) -> CaptionReport:
    """Captions a source to its end; in live pace, to its end or Ctrl-C.

    However it ends, its threads have ended, and the files are whole and can be gone on with.

    Args:
        request: What is captioned, how and where to.
        model: Its name.
        load: `load(model)` gives the model and its processor; called once the source has been opened.
        on_caption: Called with the second of each caption and answer, and its text, as it is said.
        report: The one to fill, which then tells of a run that ended in an error, too.
        stop: A `GracefulStop` that is listening; it waits while something is written.

    Raises:
        UserError: A source, a model or an output cannot be, or the state is of another run.
        KeyboardInterrupt: Where every frame is watched.
    """
    report = report if report is not None else CaptionReport()
    deferred = stop.deferred if stop is not None else nullcontext
    state = RunState(request, model)
    # the session has seen what comes up to here; what comes live has not been there before
    after = state.position.seconds
    with _open(request, after) as source:
        check_outputs(request)
        report.live = source.is_live if request.live is None else request.live
        if request.cue == "said" and not report.live:
            raise UserError(
                "cue='said' is for live pace; a video that is watched frame by frame has no clock.", field="cue"
            )
        session = state.session(*load(model))
        offset = state.offset(source.is_live)
        after = None if source.is_live else after
        with deferred():
            outputs = Outputs(request, state.resumed, None if after is None else state.position.until)
        with outputs:
            run = _Run(request, source, session, state, outputs, report, deferred, offset, on_caption)
            if after is not None:
                run.say_again(after)
            try:
                report.began = True
                run.watch(after)
            except KeyboardInterrupt:
                # the session may be in the middle of a caption: the state saved before it is the one to go on from
                report.stopped = True
                if not report.live:
                    raise
            finally:
                report.damaged, report.reconnects = source.counts.skipped, source.counts.reconnects
                report.recording = outputs.recording
            with deferred():
                outputs.close(source.duration)
            if not report.stopped:
                outputs.make_videos()
                state.finish()
    return report


def _open(request: CaptionRequest, after: float | None) -> VideoSource:
    seconds = request.reconnect_for
    # what lies whole on a server keeps pace like a file: by the clock, not by how fast it is sent
    found_out = request.live and is_address(request.path)
    return open_source(
        request.source,
        request.fps,
        start=request.start,
        end=request.end,
        after=after,
        live=None if found_out else request.live,
        options=request.source_options,
        backoff=None if seconds is None else Backoff(attempts=math.inf, seconds=seconds),
    )


@dataclass
class _Passing:
    """Frames on their way from a source, and its `close`, which any thread may call."""

    frames: Iterator[Frame]
    close: Callable[[], None]

    def __iter__(self) -> Iterator[Frame]:
        return self.frames


@dataclass
class _Run:
    """A session that watches a source; what it says is written. `offset`: seconds from its clock to the captions'."""

    request: CaptionRequest
    source: VideoSource
    session: StreamingSession
    state: RunState
    outputs: Outputs
    report: CaptionReport
    deferred: Callable[[], AbstractContextManager[None]]
    offset: float
    on_caption: Callable[[float, str], object]

    def __post_init__(self) -> None:
        # in live pace, captions begin when they were said unless asked otherwise
        self._late = self.report.live if self.request.cue is None else self.request.cue == "said"
        self._questions = sorted(self.request.questions, key=lambda question: question.seconds)
        self._asked = self.state.position.asked
        self._time = 0.0  # of the frame at hand, on the source's clock
        self._shown_at: float | None = None  # when it was there, on the clock of live pace

    def say_again(self, after: float) -> None:
        """Writes what an earlier run said of its last frame, at `after`; the session stands there."""
        self._time = after
        with self.deferred():
            for at, text, lag in self.state.position.said:
                self.outputs.say(at, text, lag)

    def watch(self, after: float | None) -> None:
        """Watches all frames later than `after`."""
        with closing(self._watched(after)) as captions:
            for found in captions:
                self._time = found.time
                # a file's own pace has no clock that a caption could lag behind
                self._shown_at = time.monotonic() - found.lag if self.report.live else None
                if found.text:
                    self._say(found.text, found.lag if self.report.live else None)
                self._answer(self.offset + self._time)
                self._reached()
        if self.session.frames:
            self._answer(math.inf)
            self._reached(save=True)

    def _watched(self, after: float | None) -> Generator[FrameCaption, None, None]:
        # what can only be read from its beginning is read up to there
        new = (frame for frame in self.source if after is None or frame.time > after + TOLERANCE)
        frames = _Passing(self.outputs.recorded(new), self.source.close)
        report = self.report
        if report.live:
            in_real_time = not self.source.is_live
            found = watch_live(self.session, frames, self.request.fps, counts=report.count, in_real_time=in_real_time)
        else:
            found = watch(self.session, frames, report.count, prefetch=not self.outputs.records)
        with closing(found) as captions:
            for one in captions:
                report.longest_lag, report.last_lag = max(report.longest_lag, one.lag), one.lag
                report.total_lag += one.lag
                yield one

    def _say(self, text: str, lag: float | None) -> None:
        self.report.said += 1
        seconds = self.offset + self._time
        at = self.state.at(seconds + ((lag or 0.0) if self._late else 0.0))
        with self.deferred():
            self.outputs.say(at, text, lag, at - self.offset)
            self.state.say(seconds, at, text, lag)
        self.on_caption(at, text)

    def _answer(self, until: float) -> None:
        """Asks the questions whose time has come, each of the frame at hand."""
        while self._asked < len(self._questions) and self._questions[self._asked].seconds <= until + TOLERANCE:
            question = self._questions[self._asked]
            budget = TimeBudget(time.monotonic, ANSWER_SECONDS) if self.report.live else None
            answer = self.session.ask(question.text, should_stop=budget)
            self._asked += 1
            self.report.count.truncated += budget is not None and budget.spent
            lag = None if self._shown_at is None else time.monotonic() - self._shown_at
            self._say(f"{question.text} {answer or '(no answer)'}", lag)

    def _reached(self, save: bool = False) -> None:
        with self.deferred():
            self.state.reached(self.offset + self._time, self._asked, self.session)
            if save:
                self.state.save(self.session)
