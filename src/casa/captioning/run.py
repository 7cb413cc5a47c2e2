"""One run: frames from a source, through a session, to captions that are on disk as soon as they are said."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa.captioning.ending import Ending
from casa.captioning.outputs import Outputs, check_outputs
from casa.captioning.progress import Progress
from casa.captioning.questions import Questions
from casa.captioning.request import Request
from casa.errors import UserError
from casa.media import Backoff, VideoSource, open_source
from casa.media.streams import is_address
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import Count, FrameCaption, StreamingSession, watch, watch_live
from casa.streaming.pacing import Budget

Load = Callable[[str], tuple[CasaForConditionalGeneration, CasaProcessor]]
Tell = Callable[[float, str], object]
ANSWER_SECONDS = 5.0  # in live pace, the longest that an answer may take from its first word on
TOLERANCE = 1e-3  # s: what FFmpeg's clocks may be off


@dataclass
class Report:
    """What happened in a run. live: whether it kept pace with the clock. lags: of its frames, in s; longest, sum.

    damaged: packets, frames and picture files. reconnects: connections made after the first. stopped: by
    Ctrl-C, which is how live pace ends; the state is kept. recording: the video of what comes only once, if asked for.
    began: whether it came to watching at all.
    """

    live: bool = False
    count: Count = field(default_factory=Count)
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
        return not (self.count.dropped or self.count.cut or self.count.skipped or self.damaged or self.reconnects)

    def sentence(self) -> str:
        """All counts in one line."""
        count, frames = self.count, max(1, self.count.frames)
        told = [f"{count.frames} frames watched, {self.said} captions"]
        if self.live:
            lag = f"lag {self.total_lag / frames:.2f} s on average, {self.longest_lag:.2f} s at most"
            told += [f"{count.dropped} dropped", f"{count.cut} cut short", f"{lag}, {self.last_lag:.2f} s at the end"]
        slow = "this machine is too slow for that: look at fewer frames a second, or at smaller pictures"
        told += [slow] if self.live and count.is_too_much else []
        told += [f"{count.skipped} no pictures"] if count.skipped else []
        told += [f"{self.damaged} damaged packets or frames"] if self.damaged else []
        told += [f"{self.reconnects} times connected again"] if self.reconnects else []
        return "; ".join(told) + "."


def caption(
    request: Request,
    model: str,
    load: Load,
    tell: Tell = lambda at, text: None,
    *,
    report: Report | None = None,
    ending: Ending | None = None,
) -> Report:
    """Captions a source to its end; in live pace, to its end or Ctrl-C.

    model, load: `load(model)` gives the model and its processor; called once the source has been opened. tell: called
    with each caption and answer, and its second, as it is said. report: the one to fill, which then tells of a run that
    ended in an error, too. ending: an `Ending` that is listening; it waits while something is written.
    However it ends, its threads have ended, and the files are whole and can be gone on with.
    Raises UserError for a source, a model or an output that cannot be, and for a state of another run.
    KeyboardInterrupt is raised where every frame is watched.
    """
    report = report if report is not None else Report()
    held = ending.held if ending is not None else nullcontext
    progress = Progress(request, model)
    after = progress.place.seconds
    with _open(request, after) as source:
        check_outputs(request)
        report.live = source.is_live if request.live is None else request.live
        late = _stands_when_said(request, report.live)
        session = progress.session(*load(model))
        offset = progress.offset(source.is_live)
        # up to where the session has seen what comes now; what comes live has not been there before
        passed = None if source.is_live else after
        until = None if passed is None else progress.place.until
        questions = Questions(request.questions, progress.place.asked)
        with held():
            outputs = Outputs(request, progress.resumed, until)
        with outputs:
            frames = _Frames(outputs.recorded(_behind(source, passed)), source.close)

            def said(seconds: float, text: str, lag: float | None = None) -> None:
                report.said += 1
                at = progress.at(offset + seconds + ((lag or 0.0) if late else 0.0))
                with held():
                    outputs.say(at, at - offset, text, lag)
                    progress.say(offset + seconds, at, text, lag)
                tell(at, text)

            seconds, shown_at = 0.0, None
            if passed is not None:
                # where the session stands, also if no frame comes any more
                seconds = passed
                with held():
                    for at, text, lag in progress.place.said:
                        outputs.say_again(at, text, lag)
            try:
                report.began = True
                with closing(_watched(session, frames, request, source, report, not outputs.records)) as moments:
                    for moment in moments:
                        seconds = moment.time
                        # a file's own pace has no clock that a caption could lag behind
                        shown_at = time.monotonic() - moment.lag if report.live else None
                        if moment.text:
                            said(seconds, moment.text, moment.lag if report.live else None)
                        _answer(session, questions, offset + seconds, seconds, shown_at, said, report)
                        with held():
                            progress.reached(offset + seconds, questions.asked, session)
                if session.frames:
                    _answer(session, questions, math.inf, seconds, shown_at, said, report)
                    with held():
                        progress.reached(offset + seconds, questions.asked, session)
                        progress.save(session)
            except KeyboardInterrupt:
                # the session may be in the middle of a caption: the state saved before it is the one to go on from
                report.stopped = True
                if not report.live:
                    raise
            finally:
                report.damaged, report.reconnects = source.counts.skipped, source.counts.reconnects
                report.recording = outputs.recording
            with held():
                outputs.close(source.duration)
            if not report.stopped:
                outputs.make_videos()
        if not report.stopped:
            progress.finish()
    return report


@dataclass
class _Frames:
    """Frames on their way from a source, and its `close`, which any thread may call."""

    frames: Iterator[Any]
    close: Callable[[], None]

    def __iter__(self) -> Iterator[Any]:
        return self.frames


def _open(request: Request, after: float | None) -> VideoSource:
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


def _stands_when_said(request: Request, live: bool) -> bool:
    """Whether captions begin when they were said; at the time of their frame otherwise."""
    if request.cue == "said" and not live:
        raise UserError("--cue said is for live pace; a video that is watched frame by frame has no clock.")
    return live if request.cue is None else request.cue == "said"


def _behind(frames: Iterable[Any], after: float | None) -> Iterator[Any]:
    """The frames later than that: what can only be read from its beginning is read up to there."""
    return (frame for frame in frames if after is None or frame.time > after + TOLERANCE)


def _watched(
    session: StreamingSession, frames: Iterable[Any], request: Request, source: VideoSource, report: Report, ahead: bool
) -> Generator[FrameCaption, None, None]:
    if not report.live:
        watched = watch(session, frames, report.count, ahead=ahead)
    else:
        watched = watch_live(session, frames, request.fps, count=report.count, in_real_time=not source.is_live)
    with closing(watched) as moments:
        for moment in moments:
            report.longest_lag, report.last_lag = max(report.longest_lag, moment.lag), moment.lag
            report.total_lag += moment.lag
            yield moment


def _answer(
    session: StreamingSession,
    questions: Questions,
    at: float,
    seconds: float,
    shown_at: float | None,
    said: Callable[[float, str, float | None], None],
    report: Report,
) -> None:
    """shown_at: when the frame was there, on the clock of live pace."""
    for question in questions.due(at):
        budget = Budget(time.monotonic, ANSWER_SECONDS) if report.live else None
        answer = session.ask(question.text, cut=budget)
        report.count.cut += budget is not None and budget.spent
        lag = None if shown_at is None else time.monotonic() - shown_at
        said(seconds, f"{question.text} {answer or '(no answer)'}", lag)
