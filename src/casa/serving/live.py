"""One live stream as its reader is told of it: events on their way, the captions so far, and figures.

model's thread --on_event--> LiveStream --put--> Outbox [e e e e e] --get--> the reader's own task
                                        --add--> Transcript, on the TranscriptStore, for download
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from PIL import Image

from casa.media.subtitles import FORMATS, Caption, captions_from_frames, captions_text
from casa.serving.baseline import InsertionTally
from casa.serving.metrics import STREAM_SECONDS, Metrics, RecentCounts
from casa.streaming import SessionEvent, StreamingSession
from casa.streaming.pacing import Clock

# in the order in which a slow reader loses them; answers, errors and the rest are lost only if nothing else waits
LOSABLE = ("usage", "dropped", "caption")
TYPES = {"srt": "application/x-subrip", "vtt": "text/vtt", "jsonl": "application/jsonl"}

KEPT_CAPTIONS = 8  # that a stream which moves has with it, in case they were not told

Message = dict[str, Any]  # as JSON holds it


class Outbox:
    """At most `max_messages` on their way to one reader, put from any thread. Made in the event loop of its reader.

    Nothing here waits: what is too much leaves at the front, least important kinds first. `on_lost` is called for each
    caption that is lost so; `missed` counts them.
    """

    def __init__(self, max_messages: int, on_lost: Callable[[], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._messages: deque[Message] = deque()
        self._lock = threading.Lock()
        self._max, self._on_lost = max_messages, on_lost
        self.missed = 0

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        with self._lock:
            if len(self._messages) >= self._max:
                self._lose_one()
            self._messages.append(message)
        # the loop may have ended, and the reader with it
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> Message:
        """The next message; captions and usage say how many captions were missed until then."""
        while True:
            with self._lock:
                if self._messages:
                    message = self._messages.popleft()
                    return message | {"missed": self.missed} if message["type"] in ("caption", "usage") else message
                self._ready.clear()
            await self._ready.wait()

    def _lose_one(self) -> None:
        order = {kind: place for place, kind in enumerate(LOSABLE)}
        index = min(range(len(self._messages)), key=lambda n: order.get(self._messages[n]["type"], len(LOSABLE)))
        if self._messages[index]["type"] == "caption":
            self.missed += 1
            if self._on_lost is not None:
                self._on_lost()
        del self._messages[index]


class Transcript:
    """The captions of one stream, the newest `max_captions` of them."""

    def __init__(self, max_captions: int) -> None:
        self._said: deque[tuple[float, tuple[str, float | None]]] = deque(maxlen=max_captions)
        self._lock = threading.Lock()

    def add(self, time: float, text: str, lag: float | None = None) -> None:
        """Adds what was said of the frame at that time; of an earlier one too, where a video was wound back."""
        with self._lock:
            self._said.append((time, (text, lag)))

    def captions(self) -> list[Caption]:
        """In order of time; of two at the same time the later one stands."""
        with self._lock:
            at = dict(self._said)
        times = sorted(at)
        said = [at[time] for time in times]
        return captions_from_frames(times, [text for text, _ in said], lags=[lag for _, lag in said])

    def file(self, kind: str) -> str:
        """The text of a subtitle file. kind: "srt", "vtt" or "jsonl"."""
        return captions_text(self.captions(), FORMATS[f".{kind}"])


class TranscriptStore:
    """Transcripts by stream. Those of streams that have ended stay for `seconds`, the newest `max_ended` of them."""

    def __init__(self, max_ended: int, seconds: float, clock: Clock = monotonic) -> None:
        self._max, self._seconds, self._clock = max_ended, seconds, clock
        self._live: dict[str, Transcript] = {}
        self._ended: OrderedDict[str, tuple[float, Transcript]] = OrderedDict()

    def open(self, name: str, transcript: Transcript) -> None:
        self._live[name] = transcript

    def end(self, name: str) -> None:
        if (transcript := self._live.pop(name, None)) is not None:
            self._ended[name] = (self._clock(), transcript)
        self._tidy()

    def find(self, name: str) -> Transcript | None:
        self._tidy()
        ended = self._ended.get(name)
        return self._live.get(name) if ended is None else ended[1]

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)

    def _tidy(self) -> None:
        oldest = self._clock() - self._seconds
        while self._ended and (len(self._ended) > self._max or next(iter(self._ended.values()))[0] < oldest):
            self._ended.popitem(last=False)


@dataclass(frozen=True)
class QueuedFrame:
    """A frame in line."""

    number: int  # counted from 1, as sent
    time: float  # in the video, in seconds
    picture: Image.Image
    arrived: float = field(default_factory=monotonic)


class LiveStream:
    """What a stream's reader is told, and what is counted.

    Args:
        name: of the stream and its session.
        fps: frames a second that it means to send; a caption is cut 1 / fps seconds after its first token.
        outbox: of its reader.
        transcript: of its captions.
        metrics: of the server.
        load: where what became of frames is counted, for all streams together.
        clock: in seconds.
    """

    def __init__(
        self,
        name: str,
        fps: float,
        outbox: Outbox,
        transcript: Transcript,
        metrics: Metrics,
        load: RecentCounts | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self.name, self.fps, self.outbox, self.transcript = name, fps, outbox, transcript
        self._metrics = metrics
        self._recent = [RecentCounts(STREAM_SECONDS, clock), *([] if load is None else [load])]
        self.session: StreamingSession | None = None
        self.tally: InsertionTally | None = None
        self.dropped = self.truncated = 0  # frames that were not watched; captions and answers that time cut
        self.cache_bytes = 0  # what its session held after its last turn
        self.frame = 0  # the number of the last one watched
        self.said: deque[Message] = deque(maxlen=KEPT_CAPTIONS)  # the last captions, as they were told
        self._time = 0.0  # where in the video the last frame stood

    def drop(self, *, late: bool = True) -> None:
        """Counts a frame that will not be watched. late: for want of time."""
        self.dropped += 1
        if late:
            self._count("dropped")
        self._metrics.count("dropped")
        self.outbox.put({"type": "dropped", "count": self.dropped})

    def on_event(self, event: SessionEvent) -> None:
        """Passes on what a turn came to. On the model's thread, as soon as it is there."""
        self.measure()
        if not event.complete:
            self.truncated += 1
            self._metrics.count("truncated")
            self._count("truncated")
        if event.error is not None:
            self.fail(event.error, event.tag)
        elif isinstance(event.tag, QueuedFrame):
            self._caption(event.tag, event)
        else:
            self._metrics.count("answers")
            if self.tally is not None:
                self.tally.answer(str(event.tag), event.text)
            said = {"question": event.tag, "text": event.text, "complete": event.complete}
            self.outbox.put({"type": "answer", **said, "time": self._time, "lag": round(event.lag, 4)})

    def fail(self, sentence: str, tag: object = None) -> None:
        """Says that a turn came to nothing. tag: the frame that it was, or the question."""
        self._metrics.count("errors")
        about = {"frame": tag.number} if isinstance(tag, QueuedFrame) else {}
        self.outbox.put({"type": "error", "message": sentence, "fatal": False, **about})

    def measure(self) -> None:
        """Notes what the session holds, for whoever asks from another thread."""
        self.cache_bytes = 0 if self.session is None else self.session.usage.cache_bytes

    def _caption(self, frame: QueuedFrame, event: SessionEvent) -> None:
        self._time, self.frame = frame.time, frame.number
        self._metrics.count("frames")
        self._count("watched")
        self._metrics.observe(event.lag)
        about = {"frame": frame.number, "time": frame.time, "lag": round(event.lag, 4), "complete": event.complete}
        if event.text:
            self._metrics.count("captions")
            self.transcript.add(frame.time, event.text, event.lag)
            self.said.append({"type": "caption", **about, "text": event.text})
            self.outbox.put(self.said[-1])
        counts = {"dropped": self.dropped, "truncated": self.truncated, "advice": self._recent[0].advice(self.fps)}
        self.outbox.put({"type": "usage", **about, **self._usage(event), **counts})

    def _count(self, kind: str) -> None:
        for recent in self._recent:
            recent.count(kind)

    def _usage(self, event: SessionEvent) -> Message:
        if self.session is None:
            return {}
        usage, tally = self.session.usage, self.tally
        return {
            "watched": self.session.frames,
            "latency": round(event.latency, 4),
            "cache_bytes": usage.cache_bytes,
            "text_tokens": usage.text_tokens,
            "image_tokens": usage.image_tokens,
            "insertion": tally and tally.frame(usage.image_tokens, event.text, event.latency),
        }
