"""A soft subtitle track: captions that a player can switch on and off, beside the untouched video and sound.

The packets of the original are copied, not encoded again, on a clock that begins at 0. Text packets are made here:
their form is simple, and PyAV needs no subtitle encoder for them. MP4 wants the text with its length in front (3GPP
timed text), Matroska the bare text of SubRip.

Not every container takes every codec, and some take what nobody can read afterwards. So the beginning of a film is
copied first, into memory, and read again: what cannot be done is known before anything else is done.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from casa.atomic import replacing
from casa.errors import UserError
from casa.media.decoder import BACKWARDS, VideoDecoder, demuxed, import_av
from casa.media.subtitles import Caption, tidy
from casa.media.video import sniff

if TYPE_CHECKING:  # PyAV is an extra
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream

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
    """Writes the video at `source_path` again, as it is, with `captions` as a track of text.

    Text tracks, attached pictures and other extras of the original are left out.

    Args:
        source_path: A video file.
        captions: The text.
        out_path: Ends in .mp4, .m4v, .mov or .mkv; may be `source_path`, which is replaced when all is done, and stays
            as it is if anything fails.
        language: Three letters (ISO 639-2) that players show.

    Raises:
        UserError: What `check_subtitle_track` raises, or a full disk.
    """
    check_subtitle_track(source_path, out_path)
    with ExitStack() as stack:
        unfinished = stack.enter_context(replacing(out_path))
        given = stack.enter_context(_opened(source_path))
        try:
            _copy(given, f"file:{unfinished}", Path(out_path).suffix.lower(), tidy(captions), language)
        except (OSError, ValueError, import_av().error.FFmpegError) as error:
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{out_path} cannot be written ({said}): convert the video, or free space.") from error


def check_subtitle_track(source_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> None:
    """Checks that `add_subtitle_track` can do it, as far as the beginning of the film tells.

    Raises:
        UserError: The source cannot be read, the destination has no known ending, or its container cannot hold the
            codec; the sentence names the endings that can.
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
    with VideoDecoder.of_file(source_path, format=kind.format) as decoder:
        if next(decoder.frames(), None) is None:
            raise UserError(f"{source_path} holds no readable frame: it is damaged or cut off, so copy it again.")
    if _can_be_done(source_path, suffix):
        return
    others = [other for other in _KINDS if other != suffix and _can_be_done(source_path, other)]
    if others:
        instead = f"write {' or '.join(others)} instead"
    else:
        instead = "no other can either, so convert the video, or draw the captions into it"
    with _opened(source_path) as given:
        codecs = [stream.codec_context for stream in _worth_copying(given)]
        what = ", ".join("a codec of no name" if one is None else one.codec.canonical_name for one in codecs)
    raise UserError(f"{suffix} cannot hold what is in {source_path} ({what}) as it is: {instead}.")


def _opened(path: str | os.PathLike[str]) -> "InputContainer":
    # genpts: AVI, for one, has no times of its frames, but of their packets
    options = {"protocol_whitelist": "file", "fflags": "+genpts"}
    return import_av().open("file:" + os.path.abspath(path), format=sniff(path).format, options=options)


class _Held(BytesIO):
    """A file in memory that outlives the container that writes to it."""

    def close(self) -> None:
        pass


def _can_be_done(path: str | os.PathLike[str], suffix: str) -> bool:
    """Whether the film's beginning, in that container, is read as what it is."""
    av = import_av()
    held = _Held()
    try:
        with _opened(path) as given:
            _copy(given, held, suffix, [Caption(0.0, 1.0, "-")], "und", TRIAL)
        held.seek(0)
        with _opened(path) as given, av.open(held) as made:
            return _begins_alike(given, made)
    except (OSError, ValueError, av.error.FFmpegError):
        return False


def _begins_alike(given: "InputContainer", made: "InputContainer") -> bool:
    wanted, found = (next(one.decode(_film(one)), None) for one in (given, made))
    if wanted is None or found is None:
        return False
    one, other = (frame.to_ndarray(format="rgb24").astype(np.int16) for frame in (wanted, found))
    # what FFmpeg makes of the last columns of an odd width is not always the same
    return one.shape == other.shape and float(np.abs(one - other).mean()) < 4


def _copy(
    given: "InputContainer",
    where: str | BytesIO,
    suffix: str,
    captions: list[Caption],
    language: str,
    most: int | None = None,
) -> None:
    """Copies everything into a new container; `most` is so many packets of it."""
    container, codec = _KINDS[suffix]
    # negative: decoding begins before what is shown first, which is at 0
    options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}
    with import_av().open(where, "w", format=container, options=options) as made:
        # as they are: with an encoder of the same name, what this FFmpeg only decodes could not be copied
        copies = {s.index: made.add_stream_from_template(s, opaque=True) for s in _worth_copying(given)}
        text = made.add_mux_stream(codec)
        text.time_base = _MILLISECONDS
        text.metadata["language"] = language
        waiting = [(caption.start, _text_packet(caption, codec, text)) for caption in reversed(captions)]
        streams = [s for s in given.streams if s.index in copies]
        for packet, decoded_at in islice(_on_one_clock(given, streams), most):
            # text lies in the file where it is shown, so that a player finds it when it gets there
            while waiting and waiting[-1][0] <= decoded_at:
                made.mux(waiting.pop()[1])
            packet.stream = copies[packet.stream.index]
            made.mux(packet)
        while waiting:
            made.mux(waiting.pop()[1])


def _on_one_clock(given: "InputContainer", streams: "list[Stream]") -> "Iterator[tuple[Packet, float]]":
    """The packets of `streams`, on a clock that begins at 0 and never goes back, and when each is decoded, in s.

    A broadcast begins at any hour, films that were joined begin again in the middle, and containers take no stream
    whose packets are not in order.
    """
    begin = None if given.start_time is None else Fraction(given.start_time, import_av().time_base)
    last: dict[int, int] = {}
    for packet, shown, decoded in _with_times(demuxed(given, streams)):
        tick, index = packet.time_base, packet.stream.index
        begin = shown * tick if begin is None else begin
        dts = decoded - round(begin / tick)
        before = last.get(index)
        if before is not None and (dts - before) * tick < -BACKWARDS:
            begin += (dts - before - (packet.duration or 1)) * tick
            dts = decoded - round(begin / tick)
        last[index] = dts = dts if before is None else max(dts, before + 1)
        packet.dts, packet.pts = dts, max(shown - round(begin / tick), dts)
        yield packet, float(dts * tick)


def _with_times(packets: "Iterable[Packet]") -> "Iterator[tuple[Packet, int, int]]":
    """Packets that have data, each with when it is shown and when it is decoded, in its own ticks.

    Of Matroska's first packets, the last at most says when it is decoded: each was a step before the next.
    """
    waiting: dict[int, list[Packet]] = defaultdict(list)
    begun: set[int] = set()
    for packet in packets:
        if packet.size:  # none is the end of a stream
            index = packet.stream.index
            waiting[index].append(packet)
            if index in begun or packet.dts is not None:
                begun.add(index)
                yield from _counted_back(waiting.pop(index))
    for first in waiting.values():
        yield from _counted_back(first)


def _counted_back(packets: "list[Packet]") -> "Iterator[tuple[Packet, int, int]]":
    last, decoded = packets[-1], packets[-1].dts
    if decoded is None:
        # none says so: then they are decoded as they are shown, or nobody can tell
        shown = [packet.pts for packet in packets if packet.pts is not None]
        if len(shown) < len(packets) or shown != sorted(shown):
            raise ValueError("it does not say when its frames are shown")
        decoded = shown[-1]
    rate = getattr(last.stream, "average_rate", None)
    usual = int(1 / (rate * last.time_base)) if rate else 1
    step = max(1, last.duration or usual)
    for k, packet in enumerate(packets):
        at = decoded - (len(packets) - 1 - k) * step
        yield packet, at if packet.pts is None else packet.pts, at


def _worth_copying(container: "InputContainer") -> "list[Stream]":
    cover = import_av().stream.Disposition.attached_pic
    worth = [s for s in container.streams if s.type in ("video", "audio") and not s.disposition & cover]
    # an AVIF sequence begins with one picture of it, which is no film of its own
    films = [s for s in worth if s.type == "video" and s.frames != 1]
    return [s for s in worth if s.type == "audio" or s in films or not films]


def _film(container: "InputContainer") -> "VideoStream":
    indices = [stream.index for stream in _worth_copying(container)]
    found = [stream for stream in container.streams.video if stream.index in indices]
    if not found:
        raise ValueError("there is no picture in it")
    return found[0]


def _text_packet(caption: Caption, codec: str, stream: "Stream") -> "Packet":
    data = caption.text.encode("utf-8")
    if codec == "mov_text":
        # the length has 16 bits; a cut in the middle of a letter is mended
        data = data[:0xFFFF].decode("utf-8", "ignore").encode("utf-8")
        data = len(data).to_bytes(2, "big") + data
    packet = import_av().Packet(data)
    packet.stream = stream
    packet.time_base = _MILLISECONDS
    packet.pts = packet.dts = round(caption.start * 1000)
    packet.duration = round((caption.end - caption.start) * 1000)
    return packet
