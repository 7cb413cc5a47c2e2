"""Streams that may break off and come back: network addresses, cameras, screens.

A live stream is given on one rising clock whatever its own does: after a new connection, or when its clock jumps back,
it goes on where it would be had nothing happened.

    stream's clock    0 -- 1 -- 2 -- 3 x          0 -- 1 -- 2
    given             0 -- 1 -- 2 -- 3 ...(4 s).. 7 -- 8 -- 9

A file on a server (it has a length) is taken up again at the second where it broke off.
"""

import logging
import math
import time
from collections.abc import Callable, Generator
from typing import Any

from casa.errors import UserError
from casa.media.backoff import Backoff
from casa.media.decoder import Decoder
from casa.media.sampling import as_they_come, on_screen, spans
from casa.media.source import Counts, Frame, Source, check_fps
from casa.media.upright import upright

# A clock that goes back by more than this has been set anew; by less, a frame is out of order.
BACKWARDS = 1.0

log = logging.getLogger("casa.media")

Open = Callable[[Counts], Decoder]


class StreamSource(Source):
    """Frames of a stream that is opened, and opened again when it breaks off, by `open_decoder`.

    name: how sentences and `describe` call it. live: None finds out: what has no length is live. backoff: None tries a
    live stream without end, and anything else as often as `Backoff` does. clock, sleep: for tests; sleeping is
    otherwise cut short by `close`.
    Raises UserError at once if the first connection fails, and while reading when `backoff` gives up.
    """

    def __init__(
        self,
        open_decoder: Open,
        name: str,
        fps: float = 2.0,
        *,
        live: bool | None = None,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        check_fps(fps)
        super().__init__(name)
        self._name, self._fps, self._again = name, fps, open_decoder
        self._clock = clock
        self._sleep = sleep if sleep is not None else self._stopping.wait
        self._decoder = open_decoder(self.counts)
        self.is_live = not _has_length(self._decoder) if live is None else live
        if backoff is None:
            backoff = Backoff(attempts=math.inf) if self.is_live else Backoff()
        self._backoff, self._broke_off = backoff, 0.0
        self.describe = f"{name}: {self._decoder.summary}{', live' if self.is_live else ''}"

    def _free(self) -> None:
        self._decoder.close()

    def _read(self) -> Generator[Frame, None, None]:
        timed = self._timed()
        if self.is_live:
            chosen = as_they_come(timed, self._fps)
        else:
            chosen = on_screen(spans(timed, self.counts), self._fps, 0.0, math.inf)
        try:
            for number, (seconds, raw) in enumerate(chosen):
                picture, _ = upright(raw, self._decoder.aspect)
                yield Frame(picture, seconds, number)
                del picture, raw  # nothing is kept alive while the next frame is decoded
            if not self.counts.decoded and not self._stopping.is_set():
                raise UserError(f"{self._name} holds no readable frame: it is damaged, or no video.")
        finally:
            self._decoder.close()

    def _timed(self):
        """(seconds, raw frame, length), rising over all connections."""
        live = _LiveClock(self._clock) if self.is_live else None
        last, until, failures = -math.inf, 0.0, 0
        while True:
            for stated, raw, length in self._decoder.frames():
                if self._stopping.is_set():
                    return
                seconds = live.place(stated if self._decoder.timed else None, length) if live is not None else stated
                if seconds <= last:
                    # a file taken up again begins at the key frame before: those were given already
                    self.counts.skipped += self.is_live
                    continue
                last, until, failures = seconds, seconds + 2 * length, 0
                yield seconds, raw, length
            # a server that tells no length breaks off at the end of a file, too
            if not self.is_live and (not self._decoder.lost or until >= self._decoder.duration):
                return
            failures = self._reconnect(failures, last)
            if self._stopping.is_set():
                return
            if live is not None:
                live.broke_off()

    def _reconnect(self, failures: int, last: float) -> int:
        """Opens the stream again, after as many attempts as it takes; how many that were in all since a frame came.

        last: where a file goes on, in seconds.
        """
        self._decoder.close()
        if not failures:
            self._broke_off = self._clock()
            log.warning("%s broke off: connecting again", self._name)
        while failures < self._backoff.attempts and (left := self._left()) > 0:
            failures += 1
            # the last attempt is made when the time is up, not before
            self._sleep(min(self._backoff.delay(failures), left))
            if self._stopping.is_set():
                return failures
            try:
                self._decoder = self._again(self.counts)
                if not self.is_live and last > 0:
                    self._decoder.seek(last)
            except UserError:
                continue
            self.counts.reconnects += 1
            return failures
        raise UserError(f"{self._name} broke off and did not come back in {failures} attempts: check its connection.")

    def _left(self) -> float:
        """Seconds for which it is still tried."""
        return self._backoff.seconds - (self._clock() - self._broke_off)


class _LiveClock:
    """Seconds from the first frame on. A stream without times of its own is timed by when its frames arrive."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: float | None = None
        self._offset: float | None = None
        self._last = self._seen_at = 0.0

    def place(self, stated: float | None, length: float) -> float:
        """When in the stream a frame appears that says `stated` (None: it says nothing)."""
        now = self._clock()
        if self._began is None:
            self._began, seconds = now, 0.0
        elif stated is None:
            seconds = now - self._began
        elif self._offset is None:
            # after a gap: what the clock on the wall says, or just after the last
            seconds = self._last + max(now - self._seen_at, length)
        elif stated + self._offset < self._last - BACKWARDS:
            self._offset, seconds = None, self._last + length
        else:
            seconds = stated + self._offset
        if self._offset is None and stated is not None:
            self._offset = seconds - stated
        self._seen_at, self._last = now, max(seconds, self._last)
        return seconds

    def broke_off(self) -> None:
        """The next frame's own time says nothing about the last one's."""
        self._offset = None


def _has_length(decoder: Decoder) -> bool:
    # a playlist is a file of some size too, whatever it lists
    return math.isfinite(decoder.duration) or (decoder.size > 0 and decoder.format not in ("hls", "dash"))
