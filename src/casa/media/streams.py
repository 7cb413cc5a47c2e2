"""Streams that may break off and come back: network addresses, cameras, the screen.

A live stream is given on one rising clock, and nothing of it twice, however often it is connected to (`_Timeline`). A
file on a server (it has a length) is taken up again at the second where it broke off.
"""

import logging
import math
import random
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from casa.errors import UserError
from casa.media.decoder import BACKWARDS, KeyFrame, KeyName, TimedFrames, VideoDecoder, import_av, sampled
from casa.media.sampling import TOLERANCE
from casa.media.source import Frame, SourceCounts, VideoSource, check_fps

SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "udp", "rtp", "tcp")
# What a server may send us to; never "file", or a playlist from outside could read this machine.
_WHITELIST = "http,https,httpproxy,tcp,tls,crypto,udp,rtp,srtp,rtmp,rtmps,data"
# Key frames that are remembered: the latest, of more than a day at one a second.
REMEMBERED = 100_000
# Playlists: what FFmpeg calls their end may be a server that is gone. They say of themselves whether they go on.
PLAYLISTS = ("hls", "dash")

log = logging.getLogger("casa.media")


@dataclass(frozen=True)
class Backoff:
    """Seconds between attempts to connect again: `first`, then doubled each time up to `longest`.

    Chance takes away up to the part `jitter` of a delay, so that a thousand viewers do not come back in one instant.

    Args:
        first: The first delay.
        longest: The longest delay.
        attempts: Connections tried in a row without a single frame before the source is given up; math.inf for ever.
        jitter: From 0 to 1.
        seconds: For how long connections are tried, from when the stream broke off; math.inf for ever.

    Raises:
        UserError: A setting makes no sense.
    """

    first: float = 0.5
    longest: float = 30.0
    attempts: float = 10
    jitter: float = 0.5
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if not (0 < self.first <= self.longest and self.attempts >= 0 and self.seconds >= 0 and 0 <= self.jitter <= 1):
            raise UserError(f"{self} makes no sense: give 0 < first <= longest, 0 or more of the rest, jitter up to 1.")

    def delay(self, attempt: int) -> float:
        """Seconds to wait before the `attempt`-th connection in a row, counted from 1."""
        # the exponent is bounded before it is taken: 2.0 ** 5000 is an error
        full = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60))
        return full * (1 - self.jitter * random.random())


def is_device(spec: str) -> bool:
    """Whether this names a camera or the screen."""
    return spec.startswith(("camera:", "/dev/video", "screen:")) or spec in ("camera", "screen")


def is_address(spec: str) -> bool:
    """Whether this is written as an address: some scheme, then "://"."""
    scheme, mark, _ = spec.partition("://")
    return bool(mark) and scheme.replace("+", "").isalnum()


def without_secrets(url: str) -> str:
    """The address without user, password and query, as it may be printed."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def device_address(spec: str, platform: str) -> tuple[str, str, dict[str, str]]:
    """What FFmpeg opens for a device: its address, its format, its options.

    Args:
        spec: "camera" or "camera:0" (by number, on Linux and macOS), "camera:/dev/video2" (Linux, by file),
            "camera:USB Camera" (macOS and Windows, by name), or "screen".
        platform: As `sys.platform`.

    Raises:
        UserError: No such device is read on this platform.
    """
    kind, _, which = spec.partition(":")
    if spec.startswith("/dev/video"):
        kind, which = "camera", spec
    camera = kind == "camera"
    if platform.startswith("linux"):
        if camera:
            which = which or "0"
            return (f"/dev/video{which}" if which.isdigit() else which), "v4l2", {}
        return which or ":0.0", "x11grab", {}
    if platform == "darwin":
        # most cameras there refuse FFmpeg's default of 29.97
        return (which or "0" if camera else f"Capture screen {which or 0}"), "avfoundation", {"framerate": "30"}
    if platform == "win32":
        if camera and (not which or which.isdigit()):
            raise UserError("On Windows a camera is called by its name: camera:Integrated Camera")
        return (f"video={which}", "dshow", {}) if camera else ("desktop", "gdigrab", {})
    raise UserError(f"Cameras are not read on {platform}: pipe them in, as ffmpeg ... | casa caption -")


def open_stream(
    spec: str,
    fps: float = 2.0,
    *,
    live: bool | None = None,
    timeout: float = 10.0,
    options: dict[str, str] | None = None,
    backoff: Backoff | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> "StreamSource":
    """Opens a camera, the screen, a stream or a file at an address, sampled at `fps`.

    A name and password in an address are used, and shown nowhere.

    Args:
        spec: As for `device_address`, or an address of one of `SCHEMES`.
        fps: Frames looked at per second.
        live: As for `StreamSource`; devices always are.
        timeout: Seconds without data after which a connection to an address counts as lost.
        options: FFmpeg's own, such as {"rtsp_transport": "udp"}, {"headers": "Authorization: Bearer ..."} or
            {"video_size": "1280x720"}.
        backoff: As for `StreamSource`.
        clock: As for `StreamSource`.

    Raises:
        UserError: An address of a kind that is not read, nothing there, or no video; no such device, one in use, or a
            PyAV without devices; while reading, a stream that broke off and did not come back.
    """
    device = is_device(spec)
    if device:
        where, format, given = device_address(spec, sys.platform)
        name = spec
        sentence = f"{spec} gives no picture: check that it is plugged in, allowed, and used by nobody else."
        if spec.startswith("screen"):
            given["framerate"] = str(max(1, round(fps)))
        try:
            import_av().format.ContainerFormat(format)
        except ValueError as error:
            raise UserError(f"This PyAV was built without {format}: install the wheel of av.") from error
    else:
        scheme = spec.partition("://")[0].lower()
        if scheme not in SCHEMES:
            raise UserError(
                f"There is no reading from {scheme}:// : give a file, or an address of {', '.join(SCHEMES)}."
            )
        where, format, name = spec, None, without_secrets(spec)
        sentence = f"{name} gives no video: check the address, and that the camera or server is on."
        given = {"protocol_whitelist": _WHITELIST}
        if scheme in ("rtsp", "rtsps"):
            # over UDP a lossy network smears the picture, and a home router lets nothing back in
            given = {"protocol_whitelist": f"{_WHITELIST},rtsp", "rtsp_transport": "tcp"}
    settings = given | (options or {})

    def connect(counts: SourceCounts) -> VideoDecoder:
        waits = None if device else timeout
        return VideoDecoder(where, name, sentence, counts, format=format, options=settings, timeout=waits, live=True)

    return StreamSource(connect, name, fps, live=True if device else live, backoff=backoff, clock=clock)


class StreamSource(VideoSource):
    """Frames of a stream that is opened by `connect`, and opened again when it breaks off.

    Args:
        connect: Opens a connection, whose decoder counts in what it is given.
        name: How sentences and `describe` call it.
        fps: Frames looked at per second.
        live: Whether frames come at their own pace. None finds out: what has no length is live.
        backoff: None tries a live stream without end, and anything else as often as `Backoff` does.
        clock: Seconds that only rise.
        sleep: Waits; None for a wait that `close` cuts short.

    Raises:
        UserError: The first connection fails; while reading, `backoff` gives up.
    """

    def __init__(
        self,
        connect: Callable[[SourceCounts], VideoDecoder],
        name: str,
        fps: float = 2.0,
        *,
        live: bool | None = None,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        check_fps(fps)
        super().__init__(name)
        self._name, self._fps, self._connect = name, fps, connect
        self._clock = clock
        self._sleep = sleep if sleep is not None else self._stopping.wait
        self._decoder = decoder = connect(self.counts)
        # a playlist is a file of some size too, whatever it lists
        ends = math.isfinite(decoder.duration) or (decoder.size > 0 and decoder.format not in PLAYLISTS)
        self.is_live = not ends if live is None else live
        if backoff is None:
            backoff = Backoff(attempts=math.inf) if self.is_live else Backoff()
        self._backoff, self._failures, self._broke_off = backoff, 0, 0.0
        self.describe = f"{name}: {self._decoder.summary}{', live' if self.is_live else ''}"

    def _free(self) -> None:
        self._decoder.close()

    def _read(self) -> Generator[Frame, None, None]:
        timed = self._timed_live() if self.is_live else self._timed_file()
        try:
            yield from sampled(timed, self._fps, lambda: self._decoder.aspect, self.is_live, self.counts)
            if not self.counts.decoded and not self._stopping.is_set():
                raise UserError(f"{self._name} holds no readable frame: it is damaged, or no video.")
        finally:
            self._decoder.close()

    def _timed_file(self) -> TimedFrames:
        last, until = -math.inf, 0.0
        while True:
            for seconds, raw, length in self._given():
                # taken up again, it begins at the key frame before: those were given already
                if seconds > last:
                    last, until, self._failures = seconds, seconds + 2 * length, 0
                    yield seconds, raw, length
            # a server that tells no length breaks off at the end of a file, too
            if self._stopping.is_set() or not self._decoder.lost or until >= self._decoder.duration:
                return
            if not self._reconnect(last):
                return

    def _timed_live(self) -> TimedFrames:
        """(seconds, raw frame, length), rising over all connections."""
        timeline = _Timeline(self._clock)
        while True:
            self._decoder.keys = keys = []
            for stated, raw, length in self._given():
                if self._stopping.is_set():
                    return
                seconds = timeline.place(stated if self._decoder.timed else None, length, keys)
                if seconds is None:
                    continue
                if seconds <= timeline.last:
                    self.counts.skipped += 1
                    continue
                timeline.last, self._failures = seconds, 0
                yield seconds, raw, length
            if self._stopping.is_set():
                return
            if _is_over(self._decoder, timeline):
                # that it was asked once more is no matter: nothing had broken off
                self.counts.reconnects -= timeline.gave_the_same
                return
            timeline.ends(self._decoder.begin)
            if not self._reconnect():
                return
            self._seek(timeline.begins(self._decoder))

    def _given(self) -> TimedFrames:
        """What the connection at hand gives; one that cannot be read from its beginning again is lost."""
        try:
            yield from self._decoder.frames()
        except UserError:
            self._decoder.lost = True

    def _seek(self, seconds: float) -> None:
        if seconds > 0:
            try:
                self._decoder.seek(seconds)
            except UserError:
                self._decoder.lost = True

    def _reconnect(self, seconds: float = 0.0) -> bool:
        """Opens the stream again at `seconds`, after as many attempts as it takes; False if it was closed meanwhile."""
        self._decoder.close()
        if not self._failures:
            self._broke_off = self._clock()
            # a playlist may only have come to its end, which it says when it is asked again
            if self._decoder.lost or self._decoder.format not in PLAYLISTS:
                log.warning("%s broke off: connecting again", self._name)
        while (left := self._backoff.seconds - (self._clock() - self._broke_off)) > 0:
            if self._failures >= self._backoff.attempts:
                break
            self._failures += 1
            # the last attempt is made when the time is up, not before
            self._sleep(min(self._backoff.delay(self._failures), left))
            if self._stopping.is_set():
                return False
            try:
                self._decoder = self._connect(self.counts)
            except UserError:
                continue
            self.counts.reconnects += 1
            self._seek(seconds)
            return True
        raise UserError(
            f"{self._name} broke off and did not come back in {self._failures} attempts: check its connection."
        )


class _Timeline:
    """One rising clock over all connections of a live stream, and what of a new one was given before.

    Seconds count from the first frame on. A stream without times of its own is timed by when its frames arrive. After a
    new connection, or when the stream's clock jumps back, it goes on where it would be had nothing happened:

        stream's clock    0 -- 1 -- 2 -- 3 x          0 -- 1 -- 2
        given             0 -- 1 -- 2 -- 3 ...(4 s).. 7 -- 8 -- 9

    A new connection may begin before the last one ended: a playlist lists what was there, a server plays its film from
    the start. Its key frames then are known, by their own times and bytes, and it is passed over up to the last frame
    that was given. One that gives all of that and nothing else is over.

        stream's clock    0 -- 1 -- 2 -- 3 x      2 -- 3 -- 4 -- 5
        given             0 -- 1 -- 2 -- 3 ..               4 -- 5

    last: seconds of the latest frame. gave_the_same: this connection gave all that was given, and nothing else.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: float | None = None
        self._arrived = 0.0  # of the latest frame, on the clock on the wall
        self.last = -math.inf
        # what is to be added to the times of the connection at hand; None if its next frame says where it stands
        self._offset: float | None = None
        # the same for what the stream's own clock says, as of the connection before
        self._ended: float | None = None
        self._given: dict[KeyName, float] = {}  # key frames, oldest first, and when they were
        # whether this connection is one that was there before; None: nothing of it was read yet
        self._known: bool | None = False
        self._place: float | None = None  # the offset that a playlist's own clock tells
        self.gave_the_same = False

    def ends(self, begin: float) -> None:
        """A connection is over whose second 0 was `begin` on the stream's own clock."""
        self._ended = None if self._offset is None else self._offset - begin
        self._offset = None

    def begins(self, decoder: VideoDecoder) -> float:
        """A new connection. Gives the second, by its own times, from which on there may be something new."""
        self._known, self.gave_the_same, self._place = None, False, None
        if not _has_end_mark(decoder) or self._ended is None:
            return 0.0
        # the whole, by its own clock, of what was seen in part
        self._place = self._ended + decoder.begin
        return self.last - self._place

    def place(self, stated: float | None, length: float, keys: list[KeyFrame]) -> float | None:
        """When a frame appears, None if it was given before.

        Args:
            stated: The frame's time on the connection's clock, None if it has none.
            length: Seconds for which it is shown.
            keys: Key frames read since the last frame; those that were taken note of are removed.
        """
        if self._was_given(stated, keys):
            return None
        seconds = self._on_the_clock(stated, length)
        latest = max(seconds, self.last)
        for at, name in keys:
            self._given[name] = latest if at is None or self._offset is None else at + self._offset
            if len(self._given) > REMEMBERED:
                del self._given[next(iter(self._given))]
        keys.clear()
        return seconds

    def _on_the_clock(self, stated: float | None, length: float) -> float:
        now = self._clock()
        if self._began is None:
            self._began, seconds = now, 0.0
        elif stated is None:
            seconds = now - self._began
        elif self._offset is None:
            # after a gap: what the clock on the wall says, or just after the last
            seconds = self.last + max(now - self._arrived, length)
        elif stated + self._offset < self.last - BACKWARDS:
            self._offset, seconds = None, self.last + length
        else:
            seconds = stated + self._offset
        if self._offset is None and stated is not None:
            self._offset = seconds - stated
        self._arrived = now
        return seconds

    def _was_given(self, stated: float | None, keys: list[KeyFrame]) -> bool:
        if self._known is False:
            return False
        for at, name in keys:
            when = self._given.get(name)
            if self._known is None:
                self._known = when is not None or self._place is not None
                if when is not None and at is not None:
                    self._offset = when - at
                elif self._place is not None:
                    self._offset = self._place
            elif self._known and when is None and self._contradicts(at):
                # the same picture at the same time, by chance: another stream after all
                self._known, self._offset = False, None
        ahead = -1.0 if stated is None or self._offset is None else stated + self._offset - self.last
        if not self._known or ahead > TOLERANCE:
            self._known = self.gave_the_same = False
            return False
        self.gave_the_same = abs(ahead) <= TOLERANCE
        # a key frame that was read ahead of its frame is new
        keys[:] = [key for key in keys if self._since_last(key[0]) > TOLERANCE]
        return True

    def _since_last(self, at: float | None) -> float:
        return -math.inf if at is None or self._offset is None else at + self._offset - self.last

    def _contradicts(self, at: float | None) -> bool:
        """Whether a key frame that was not given stands where all that were given are remembered."""
        if at is None or self._offset is None:
            return True
        if self._place is not None or self._since_last(at) > TOLERANCE:
            return False
        oldest = next(iter(self._given.values())) if len(self._given) >= REMEMBERED else 0.0
        return at + self._offset >= oldest


def _is_over(decoder: VideoDecoder, timeline: _Timeline) -> bool:
    """Whether what a live connection came to was its end."""
    if decoder.format in PLAYLISTS:
        return _has_end_mark(decoder) and not decoder.lost
    # whoever does not say how much there is breaks off at the end, too: twice at the same place, it is the end
    return (decoder.size > 0 and not decoder.lost) or timeline.gave_the_same


def _has_end_mark(decoder: VideoDecoder) -> bool:
    """Whether it is a playlist that lists all there will ever be."""
    return decoder.format in PLAYLISTS and math.isfinite(decoder.duration)
