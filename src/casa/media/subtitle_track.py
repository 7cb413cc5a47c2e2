"""A soft subtitle track: captions that a player can switch on and off, beside the untouched video and sound.

The packets of the original are copied, not encoded again. Text packets are made here: their form is simple, and PyAV
needs no subtitle encoder for them. MP4 wants the text with its length in front (3GPP timed text), Matroska the bare
text of SubRip.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from casa.atomic import replacing
from casa.errors import UserError
from casa.media.decoder import Decoder
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
        UserError: a source that cannot be read, a destination that cannot be written, or a codec that this container
            cannot hold.
    """
    suffix = Path(out_path).suffix.lower()
    if suffix not in _KINDS:
        raise UserError(f"{out_path} is no video name: let it end in {', '.join(_KINDS)}.")
    container, codec = _KINDS[suffix]
    av = import_av()
    sniff(source_path)
    # opened once in the usual way, which says in a sentence what is wrong with it
    Decoder.of_file(source_path).close()
    if not hasattr(av.container.OutputContainer, "add_mux_stream"):
        raise UserError(f"This PyAV ({av.__version__}) cannot add text to a video: install av 17 or newer.")
    with ExitStack() as stack:
        unfinished = stack.enter_context(replacing(out_path))
        given = stack.enter_context(
            av.open("file:" + os.path.abspath(source_path), options={"protocol_whitelist": "file"})
        )
        made = stack.enter_context(
            av.open(f"file:{unfinished}", "w", format=container, options={"fflags": "+bitexact"})
        )
        try:
            copies = {s.index: made.add_stream_from_template(s) for s in _worth_copying(av, given)}
        except (ValueError, av.error.FFmpegError) as error:
            raise UserError(
                f"{out_path} cannot hold what is in {source_path} ({error}): write .mkv instead."
            ) from error
        text = made.add_mux_stream(codec)
        text.time_base = _MILLISECONDS
        text.metadata["language"] = language
        # a video whose clock begins late has its captions late, too
        begin = (given.start_time or 0) / av.time_base
        waiting = [_packet(av, caption, begin, codec, text) for caption in tidy(captions)]
        waiting.reverse()
        try:
            for packet in given.demux([s for s in given.streams if s.index in copies]):
                if packet.dts is None:  # the end of a stream
                    continue
                # text lies in the file where it is shown, so that a player finds it when it gets there
                while waiting and waiting[-1].pts * _MILLISECONDS <= packet.dts * packet.time_base:
                    made.mux(waiting.pop())
                packet.stream = copies[packet.stream.index]
                made.mux(packet)
            while waiting:
                made.mux(waiting.pop())
            made.close()
        except (OSError, av.error.FFmpegError) as error:
            raise UserError(
                f"{out_path} cannot be written ({error.strerror}): convert the video, or free space."
            ) from error


def _worth_copying(av: Any, container: Any) -> list[Any]:
    cover = av.stream.Disposition.attached_pic
    return [s for s in container.streams if s.type in ("video", "audio") and not s.disposition & cover]


def _packet(av: Any, caption: Caption, begin: float, codec: str, stream: Any) -> Any:
    data = caption.text.encode("utf-8")
    if codec == "mov_text":
        # the length has 16 bits; a cut in the middle of a letter is mended
        data = data[:0xFFFF].decode("utf-8", "ignore").encode("utf-8")
        data = len(data).to_bytes(2, "big") + data
    packet = av.Packet(data)
    packet.stream = stream
    packet.time_base = _MILLISECONDS
    packet.pts = packet.dts = round((caption.start + begin) * 1000)
    packet.duration = round((caption.end - caption.start) * 1000)
    return packet
