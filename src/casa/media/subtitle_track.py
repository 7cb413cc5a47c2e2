"""A soft subtitle track: captions that a player can switch on and off, beside the untouched video and sound.

The packets of the original are copied, not encoded again, on a clock that begins at 0. Text packets are made here:
their form is simple, and PyAV needs no subtitle encoder for them. MP4 wants the text with its length in front (3GPP
timed text), Matroska the bare text of SubRip.

Not every container takes every codec, and some take what nobody can read afterwards. So the beginning of a film is
copied first, into memory, and read again: what cannot be done is known before anything else is done.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from casa.atomic import replacing
from casa.errors import UserError
from casa.media.decoder import BACKWARDS, Decoder, demuxed
from casa.media.pyav import import_av
from casa.media.sniff import sniff
from casa.media.subtitles import Caption, tidy

_MILLISECONDS = Fraction(1, 1000)
# suffix: (container, codec of the text)
_KINDS = {
    ".mp4": ("mp4", "mov_text"),
    ".m4v": ("mp4", "mov_text"),
    ".mov": ("mov", "mov_text"),
    ".mkv": ("matroska", "subrip"),
}
# How many packets are copied to see whether it can be done.
TRIAL = 120


def add_subtitle_track(
    source_path: str | os.PathLike[str],
    captions: Iterable[Caption],
    out_path: str | os.PathLike[str],
    language: str = "und",
) -> None:
    """Write the video at `source_path` again, as it is, with `captions` as a track of text.

    out_path: ends in .mp4, .m4v, .mov or .mkv; may be `source_path`, which is replaced when all is done, and stays as
    it is if anything fails. language: three letters (ISO 639-2) that players show. Text tracks, attached pictures and
    other extras of the original are left out.

    Raises:
        UserError: what `check_subtitle_track` raises, or a full disk.
    """
    check_subtitle_track(source_path, out_path)
    av = import_av()
    container, codec = _KINDS[Path(out_path).suffix.lower()]
    with ExitStack() as stack:
        unfinished = stack.enter_context(replacing(out_path))
        given = stack.enter_context(_given(av, source_path))
        try:
            _copy(av, given, f"file:{unfinished}", container, codec, tidy(captions), language)
        except (OSError, ValueError, av.error.FFmpegError) as error:
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{out_path} cannot be written ({said}): convert the video, or free space.") from error


def check_subtitle_track(source_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
    """That `add_subtitle_track` can do it, as far as the beginning of the film tells.

    Raises:
        UserError: a source that cannot be read, a destination of no known ending, or a codec that this container cannot
            hold; the sentence names the endings that can.
    """
    suffix = Path(out_path).suffix.lower()
    if suffix not in _KINDS:
        raise UserError(f"{out_path} is no video name: let it end in {', '.join(_KINDS)}.")
    av = import_av()
    if not hasattr(av.container.OutputContainer, "add_mux_stream"):
        raise UserError(f"This PyAV ({av.__version__}) cannot add text to a video: install av 17 or newer.")
    kind = sniff(source_path)
    if kind.frames != "many":
        raise UserError(
            f"{source_path} is a {kind.name} picture, which holds no text: draw the captions into it instead."
        )
    # opened once in the usual way, which says in a sentence what is wrong with it
    with Decoder.of_file(source_path, format=kind.format) as decoder:
        if next(decoder.frames(), None) is None:
            raise UserError(f"{source_path} holds no readable frame: it is damaged or cut off, so copy it again.")
    if _can_be_done(av, source_path, suffix):
        return
    others = [other for other in _KINDS if other != suffix and _can_be_done(av, source_path, other)]
    if others:
        instead = f"write {' or '.join(others)} instead"
    else:
        instead = "no other can either, so convert the video, or draw the captions into it"
    with _given(av, source_path) as given:
        what = ", ".join(_codec(s) for s in _worth_copying(av, given))
    raise UserError(f"{suffix} cannot hold what is in {source_path} ({what}) as it is: {instead}.")


def _codec(stream: Any) -> str:
    return "a codec of no name" if stream.codec_context is None else stream.codec_context.codec.canonical_name


def _given(av: Any, path: str | os.PathLike[str]) -> Any:
    # genpts: AVI, for one, has no times of its frames, but of their packets
    options = {"protocol_whitelist": "file", "fflags": "+genpts"}
    return av.open("file:" + os.path.abspath(path), format=sniff(path).format, options=options)


def _can_be_done(av: Any, path: str | os.PathLike[str], suffix: str) -> bool:
    """Whether the film's beginning, in that container, is read as what it is."""
    container, codec = _KINDS[suffix]
    held = BytesIO()
    try:
        with _given(av, path) as given:
            _copy(av, given, held, container, codec, [Caption(0.0, 1.0, "-")], "und", TRIAL)
        held.seek(0)
        with _given(av, path) as given, av.open(held) as made:
            wanted, found = (next(one.decode(_video(av, one)), None) for one in (given, made))
            return wanted is not None and found is not None and _look_alike(wanted, found)
    except (OSError, ValueError, av.error.FFmpegError):
        return False


def _look_alike(wanted: Any, found: Any) -> bool:
    one, other = (frame.to_ndarray(format="rgb24").astype(np.int16) for frame in (wanted, found))
    # what FFmpeg makes of the last columns of an odd width is not always the same
    return one.shape == other.shape and float(np.abs(one - other).mean()) < 4


class _Kept:
    """A file object that outlives the container that writes to it."""

    def __init__(self, held: BytesIO) -> None:
        self.write, self.seek, self.tell, self.read = held.write, held.seek, held.tell, held.read


def _copy(
    av: Any,
    given: Any,
    where: Any,
    container: str,
    codec: str,
    captions: list[Caption],
    language: str,
    most: int | None = None,
) -> None:
    """Everything into a new container; most: so many packets of it."""
    place = _Kept(where) if isinstance(where, BytesIO) else where
    # negative: decoding begins before what is shown first, which is at 0
    options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}
    with av.open(place, "w", format=container, options=options) as made:
        # as they are: with an encoder of the same name, what this FFmpeg only decodes could not be copied
        copies = {s.index: made.add_stream_from_template(s, opaque=True) for s in _worth_copying(av, given)}
        text = made.add_mux_stream(codec)
        text.time_base = _MILLISECONDS
        text.metadata["language"] = language
        waiting = [_packet(av, caption, codec, text) for caption in captions]
        waiting.reverse()
        streams = [s for s in given.streams if s.index in copies]
        for packet in islice(_on_one_clock(av, given, streams), most):
            # text lies in the file where it is shown, so that a player finds it when it gets there
            while waiting and waiting[-1].pts * _MILLISECONDS <= packet.dts * packet.time_base:
                made.mux(waiting.pop())
            packet.stream = copies[packet.stream.index]
            made.mux(packet)
        while waiting:
            made.mux(waiting.pop())


def _on_one_clock(av: Any, given: Any, streams: list[Any]) -> Iterator[Any]:
    """The packets of `streams`, on a clock that begins at 0 and never goes back.

    A broadcast begins at any hour, films that were joined begin again in the middle, and containers take no stream
    whose packets are not in order.
    """
    begin = None if given.start_time is None else Fraction(given.start_time, av.time_base)
    last: dict[int, int] = {}
    for packet in _with_times(demuxed(given, streams)):
        tick, index = packet.time_base, packet.stream.index
        begin = packet.pts * tick if begin is None else begin
        dts = packet.dts - round(begin / tick)
        before = last.get(index)
        if before is not None and (dts - before) * tick < -BACKWARDS:
            begin += (dts - before - (packet.duration or 1)) * tick
            dts = packet.dts - round(begin / tick)
        pts = packet.pts - round(begin / tick)
        last[index] = dts = dts if before is None else max(dts, before + 1)
        packet.dts, packet.pts = dts, max(pts, dts)
        yield packet


def _with_times(packets: Iterable[Any]) -> Iterator[Any]:
    """Packets that have data, each with its two times."""
    waiting: dict[int, list[Any]] = {}
    begun: set[int] = set()
    for packet in packets:
        if not packet.size:  # the end of a stream
            continue
        index = packet.stream.index
        if index in begun:
            yield _timed(packet)
            continue
        first = waiting.setdefault(index, [])
        first.append(packet)
        if packet.dts is not None:
            begun.add(index)
            yield from _counted_back(first)
    for index, first in waiting.items():
        if index not in begun:
            yield from _counted_back(first)


def _counted_back(packets: list[Any]) -> Iterator[Any]:
    """Packets (Matroska's first) of which at most the last says when it is decoded; each was a step before the next."""
    last = packets[-1]
    step = max(1, last.duration or _usual(last))
    if last.dts is None:
        # none says so: then they are decoded as they are shown, or nobody can tell
        shown = [packet.pts for packet in packets]
        if None in shown or shown != sorted(shown):
            raise ValueError("it does not say when its frames are shown")
        last.dts = last.pts
    for k, packet in enumerate(packets):
        packet.dts = last.dts - (len(packets) - 1 - k) * step
        yield _timed(packet)


def _usual(packet: Any) -> int:
    rate = packet.stream.average_rate if packet.stream.type == "video" else None
    return int(1 / (rate * packet.time_base)) if rate else 1


def _timed(packet: Any) -> Any:
    if packet.dts is None:
        packet.dts = packet.pts
    if packet.pts is None:
        packet.pts = packet.dts
    if packet.dts is None:
        raise ValueError("it does not say when its frames are shown")
    return packet


def _worth_copying(av: Any, container: Any) -> list[Any]:
    cover = av.stream.Disposition.attached_pic
    worth = [s for s in container.streams if s.type in ("video", "audio") and not s.disposition & cover]
    # an AVIF sequence begins with one picture of it, which is no film of its own
    films = [s for s in worth if s.type == "video" and s.frames != 1]
    return [s for s in worth if s.type == "audio" or s in films or not films]


def _video(av: Any, container: Any) -> Any:
    video = [stream for stream in _worth_copying(av, container) if stream.type == "video"]
    if not video:
        raise ValueError("there is no picture in it")
    return video[0]


def _packet(av: Any, caption: Caption, codec: str, stream: Any) -> Any:
    data = caption.text.encode("utf-8")
    if codec == "mov_text":
        # the length has 16 bits; a cut in the middle of a letter is mended
        data = data[:0xFFFF].decode("utf-8", "ignore").encode("utf-8")
        data = len(data).to_bytes(2, "big") + data
    packet = av.Packet(data)
    packet.stream = stream
    packet.time_base = _MILLISECONDS
    packet.pts = packet.dts = round(caption.start * 1000)
    packet.duration = round((caption.end - caption.start) * 1000)
    return packet
