"""What streams have said, for download while they run and for a while afterwards."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from time import monotonic

from casa.media.caption_file import captions_from_frames
from casa.media.subtitles import FORMATS, Caption, captions_text

TYPES = {"srt": "application/x-subrip", "vtt": "text/vtt", "jsonl": "application/jsonl"}


class Transcript:
    """The captions of one stream, the newest `most` of them."""

    def __init__(self, most: int) -> None:
        self._said: deque[tuple[float, tuple[str, float | None]]] = deque(maxlen=most)
        self._lock = threading.Lock()

    def add(self, time: float, text: str, lag: float | None = None) -> None:
        """time: of the frame, in seconds. A reader that goes back in its video may say earlier times again.

        lag: seconds from the frame's arrival to the text.
        """
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


class Shelf:
    """Transcripts by stream. Those of streams that have ended stay for `seconds`, the newest `most` of them."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
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
        if name in self._live:
            return self._live[name]
        return self._ended[name][1] if name in self._ended else None

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)

    def _tidy(self) -> None:
        oldest = self._clock() - self._seconds
        while self._ended and (len(self._ended) > self._most or next(iter(self._ended.values()))[0] < oldest):
            self._ended.popitem(last=False)
