"""Streams that may break off and come back: network addresses, cameras, screens.

A live stream is given on one rising clock whatever its own does: after a new connection, or when its clock jumps back,
it goes on where it would be had nothing happened.

    stream's clock    0 -- 1 -- 2 -- 3 x          0 -- 1 -- 2
    given             0 -- 1 -- 2 -- 3 ...(4 s).. 7 -- 8 -- 9

A file on a server (it has a length) is taken up again at the second where it broke off.

Nothing that was given is given again. A new connection may begin before the last one ended: a playlist lists what was
there, a server plays its film from the start. Its key frames then are known, by their own times and bytes, and it is
passed over up to the last frame that was given. One that gives all of that and nothing else is over; so is a playlist
with an end mark, and a file of known length.

    stream's clock    0 -- 1 -- 2 -- 3 x      2 -- 3 -- 4 -- 5
    given             0 -- 1 -- 2 -- 3 ..               4 -- 5
"""

import logging
import math
import time
from collections.abc import Callable, Generator
from typing import Any

from casa.errors import UserError
from casa.media.backoff import Backoff
from casa.media.decoder import BACKWARDS, Decoder, Key
from casa.media.sampling import TOLERANCE, as_they_come, on_screen, spans
from casa.media.source import Counts, Frame, Source, check_fps
from casa.media.upright import upright

# Key frames that are remembered: those of the beginning, and the latest, of more than a day at one a second.
FIRST, LATEST = 16, 100_000
# Playlists: what FFmpeg calls their end may be a server that is gone. They say of themselves whether they go on.
PLAYLISTS = ("hls", "dash")

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
        return self._timed_live() if self.is_live else self._timed_file()

    def _timed_file(self):
        last, until, failures = -math.inf, 0.0, 0
        while True:
            for seconds, raw, length in self._given():
                # taken up again, it begins at the key frame before: those were given already
                if seconds > last:
                    last, until, failures = seconds, seconds + 2 * length, 0
                    yield seconds, raw, length
            # a server that tells no length breaks off at the end of a file, too
            if self._stopping.is_set() or not self._decoder.lost or until >= self._decoder.duration:
                return
            failures = self._reconnect(failures)
            if self._stopping.is_set():
                return
            if last > 0:
                self._seek(last)

    def _timed_live(self):
        live, seen = _LiveClock(self._clock), _Seen()
        failures, first = 0, True
        while True:
            again = None if first else _Again(self._decoder, live, seen)
            if again is not None and again.begins_at > 0:
                self._seek(again.begins_at)
            self._decoder.keys = keys = []
            for stated, raw, length in self._given():
                if self._stopping.is_set():
                    return
                stated = stated if self._decoder.timed else None
                if again is not None and again.was_given(stated, keys):
                    continue
                last = live.last
                seconds = live.place(stated, length)
                seen.add(keys, live)
                if seconds <= last:
                    self.counts.skipped += 1
                    continue
                failures = 0
                yield seconds, raw, length
            if self._stopping.is_set():
                return
            if _is_over(self._decoder, again):
                # that it was asked once more is no matter: nothing had broken off
                self.counts.reconnects -= again is not None and again.gave_the_same
                return
            live.ends(getattr(self._decoder, "begin", 0.0))
            failures = self._reconnect(failures)
            if self._stopping.is_set():
                return
            first = False

    def _given(self):
        """What the connection at hand gives; one that cannot be read from its beginning again is lost."""
        try:
            yield from self._decoder.frames()
        except UserError:
            self._decoder.lost = True

    def _seek(self, seconds: float) -> None:
        try:
            self._decoder.seek(seconds)
        except UserError:
            self._decoder.lost = True

    def _reconnect(self, failures: int) -> int:
        """Opens the stream again, after as many attempts as it takes; how many that were in all since a frame came."""
        self._decoder.close()
        if not failures:
            self._broke_off = self._clock()
            # a playlist may only have come to its end, which it says when it is asked again
            if self._decoder.lost or self._decoder.format not in PLAYLISTS:
                log.warning("%s broke off: connecting again", self._name)
        while failures < self._backoff.attempts and (left := self._left()) > 0:
            failures += 1
            # the last attempt is made when the time is up, not before
            self._sleep(min(self._backoff.delay(failures), left))
            if self._stopping.is_set():
                return failures
            try:
                self._decoder = self._again(self.counts)
            except UserError:
                continue
            self.counts.reconnects += 1
            return failures
        raise UserError(f"{self._name} broke off and did not come back in {failures} attempts: check its connection.")

    def _left(self) -> float:
        """Seconds for which it is still tried."""
        return self._backoff.seconds - (self._clock() - self._broke_off)


class _LiveClock:
    """Seconds from the first frame on. A stream without times of its own is timed by when its frames arrive.

    last: of the latest frame. offset: what is to be added to the times of the connection at hand; None if its next
    frame says where it stands. ended: the same for what the stream's own clock says, as of the connection before.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: float | None = None
        self._seen_at = 0.0
        self.last = -math.inf
        self.offset: float | None = None
        self.ended: float | None = None

    def place(self, stated: float | None, length: float) -> float:
        """When in the stream a frame appears that says `stated` (None: it says nothing)."""
        now = self._clock()
        if self._began is None:
            self._began, seconds = now, 0.0
        elif stated is None:
            seconds = now - self._began
        elif self.offset is None:
            # after a gap: what the clock on the wall says, or just after the last
            seconds = self.last + max(now - self._seen_at, length)
        elif stated + self.offset < self.last - BACKWARDS:
            self.offset, seconds = None, self.last + length
        else:
            seconds = stated + self.offset
        if self.offset is None and stated is not None:
            self.offset = seconds - stated
        self._seen_at, self.last = now, max(seconds, self.last)
        return seconds

    def ends(self, begin: float) -> None:
        """A connection is over whose second 0 was `begin` on the stream's own clock."""
        self.ended = None if self.offset is None else self.offset - begin
        self.offset = None


class _Seen:
    """Key frames that were given, and when."""

    def __init__(self) -> None:
        self._first: dict[Any, float] = {}
        self._latest: dict[Any, float] = {}

    def add(self, keys: list[Key], live: _LiveClock) -> None:
        """Those read since the last frame was placed; `keys` is emptied."""
        for stated, name in keys:
            seconds = live.last if stated is None or live.offset is None else stated + live.offset
            (self._first if len(self._first) < FIRST else self._latest)[name] = seconds
            if len(self._latest) > LATEST:
                del self._latest[next(iter(self._latest))]
        keys.clear()

    def when(self, name: Any) -> float | None:
        return self._latest.get(name, self._first.get(name))

    def knows(self, seconds: float) -> bool:
        """Whether all key frames from there on are remembered."""
        oldest = next(iter((self._latest or self._first).values()), math.inf)
        return seconds >= (oldest if len(self._latest) >= LATEST else 0.0)


class _Again:
    """What a connection after the first gives, as far as it was given before.

    begins_at: the second, by its own times, from which on there may be something new. gave_the_same: whether all that
    was given came again, up to the last frame, and nothing else.
    """

    def __init__(self, decoder: Decoder, live: _LiveClock, seen: _Seen) -> None:
        self._live, self._seen = live, seen
        self._known: bool | None = None  # whether it is one that was there before; None: nothing of it was read yet
        self.gave_the_same = False
        self._place, self.begins_at = None, 0.0
        if _has_end_mark(decoder) and live.ended is not None:
            # the whole, by its own clock, of what was seen in part
            self._place = live.ended + decoder.begin
            self.begins_at = live.last - self._place

    def was_given(self, stated: float | None, keys: list[Key]) -> bool:
        """Whether the frame that says `stated` is an old one. keys: those read since the last frame."""
        for at, name in keys:
            when = self._seen.when(name)
            if self._known is None:
                self._begin(at, when)
            elif self._known and when is None and self._contradicts(at):
                # the same picture at the same time, by chance: another stream after all
                self._known, self._live.offset = False, None
        ahead = -1.0 if stated is None or self._live.offset is None else stated + self._live.offset - self._live.last
        if not self._known or ahead > TOLERANCE:
            self._known = self.gave_the_same = False
            return False
        self.gave_the_same = abs(ahead) <= TOLERANCE
        # one that was read ahead of its frame is new
        keys[:] = [key for key in keys if self._is_ahead(key[0])]
        return True

    def _is_ahead(self, at: float | None) -> bool:
        offset = self._live.offset
        return at is not None and offset is not None and at + offset > self._live.last + TOLERANCE

    def _begin(self, at: float | None, when: float | None) -> None:
        self._known = when is not None or self._place is not None
        if when is not None and at is not None:
            self._live.offset = when - at
        elif self._place is not None:
            self._live.offset = self._place

    def _contradicts(self, at: float | None) -> bool:
        if at is None or self._live.offset is None:
            return True
        if self._place is not None:
            return False
        seconds = at + self._live.offset
        return self._seen.knows(seconds) and seconds <= self._live.last + TOLERANCE


def _is_over(decoder: Decoder, again: _Again | None) -> bool:
    """Whether what a live connection came to was its end."""
    if decoder.format in PLAYLISTS:
        return _has_end_mark(decoder) and not decoder.lost
    # whoever does not say how much there is breaks off at the end, too: twice at the same place, it is the end
    return (decoder.size > 0 and not decoder.lost) or (again is not None and again.gave_the_same)


def _has_end_mark(decoder: Decoder) -> bool:
    """Whether it is a playlist that lists all there will ever be."""
    return decoder.format in PLAYLISTS and math.isfinite(decoder.duration)


def _has_length(decoder: Decoder) -> bool:
    # a playlist is a file of some size too, whatever it lists
    return math.isfinite(decoder.duration) or (decoder.size > 0 and decoder.format not in PLAYLISTS)
