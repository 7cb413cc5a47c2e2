"""Captions and their files: SubRip (.srt), WebVTT (.vtt) and one JSON object per line (.jsonl), out and in.

Every format writes `tidy(captions)`, so the files of one video agree, and reading one gives `tidy(captions)` back.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from casa.atomic import write_text
from casa.errors import UserError


@dataclass(frozen=True)
class Caption:
    """`text` shown from `start` to `end`, in seconds from the beginning of the video.

    Attributes:
        lag: For live captions, the seconds from the picture's arrival to the text's. Only JSONL holds it.

    Raises:
        UserError: A time is negative or not finite, or the end is not after the start.
    """

    start: float
    end: float
    text: str
    lag: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)) or self.start < 0:
            raise UserError(f"A caption from {self.start} to {self.end} s: give finite times from 0 on.")
        if self.end <= self.start:
            raise UserError(f"A caption from {self.start} to {self.end} s: let it end after its start.")


def tidy(captions: Iterable[Caption]) -> list[Caption]:
    """Captions as they can be written: in order, in whole milliseconds, one at a time.

    A caption still on screen when the next begins ends there. Captions that begin in the same millisecond become the
    lines of one. Blank lines, surrounding blanks, control characters and captions without text are dropped, since a
    blank line would end a subtitle early.
    """
    at: dict[int, tuple[int, list[str], float | None]] = {}
    for caption in sorted(captions, key=lambda c: c.start):
        text = _lines(caption.text)
        if not text:
            continue
        start = round(caption.start * 1000)
        end, lines, lag = at.get(start, (0, [], caption.lag))
        at[start] = (max(end, round(caption.end * 1000), start + 1), lines + text, lag)
    starts = list(at)
    return [
        Caption(start / 1000, min(at[start][0], following) / 1000, "\n".join(at[start][1]), at[start][2])
        for start, following in zip(starts, [*starts, math.inf][1:], strict=True)
    ]


def write_captions(path: str | os.PathLike[str], captions: Iterable[Caption]) -> None:
    """Writes a caption file in the format of its ending, whole or not at all.

    Raises:
        UserError: The ending is unknown, or the file cannot be written there.
    """
    write_text(path, captions_text(captions, format_of(path)))


def captions_text(captions: Iterable[Caption], format: "SubtitleFormat") -> str:
    """The text of a caption file."""
    return format.head + "".join(format.record(c, i) for i, c in enumerate(tidy(captions), start=1))


def read_captions(path: str | os.PathLike[str], data: bytes | None = None) -> list[Caption]:
    """Reads a caption file in the format of its ending; cues without text are passed over.

    Of SubRip, numbers may be missing. Of WebVTT, comments, styles, cue names, cue settings and tags such as `<v Ann>`
    are passed over. Of JSONL, further keys are.

    Args:
        path: Ends in .srt, .vtt or .jsonl.
        data: The file's bytes, where they were read already.

    Raises:
        UserError: The ending is unknown, there is no such file, it is not UTF-8, or a line (which is named) is wrong.
    """
    format = format_of(path)
    try:
        text = (Path(path).read_bytes() if data is None else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name.") from error
    return format.parse(str(path), text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))


def _srt_record(caption: Caption, number: int) -> str:
    # SubRip knows no escapes: players may read `<i>` as italics
    return f"{number}\n{_clock(caption.start, ',')} --> {_clock(caption.end, ',')}\n{caption.text}\n\n"


def _vtt_record(caption: Caption, number: int) -> str:
    text = caption.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_clock(caption.start, '.')} --> {_clock(caption.end, '.')}\n{text}\n\n"


def _json_record(caption: Caption, number: int) -> str:
    row = {"start": caption.start, "end": caption.end, "text": caption.text}
    row |= {} if caption.lag is None else {"lag": round(caption.lag, 3)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parse_srt(path: str, lines: list[str]) -> list[Caption]:
    captions = []
    for number, block in _blocks(lines):
        # a cue's own number; the times stand in the first or the second line, never later
        skip = 1 if len(block) > 1 and block[0].strip().isdigit() else 0
        captions += _cue(path, number + skip, block[skip], block[skip + 1 :])
    return captions


def _parse_vtt(path: str, lines: list[str]) -> list[Caption]:
    blocks = _blocks(lines)
    if not re.match(r"WEBVTT($|[ \t])", next(blocks, (0, [""]))[1][0]):
        raise UserError(f"{path} does not begin with WEBVTT: name a .vtt file.")
    captions = []
    for number, block in blocks:
        if re.match(r"(NOTE|STYLE|REGION)($|\s)", block[0]):
            continue
        skip = 0 if "-->" in block[0] else 1
        times = block[skip] if skip < len(block) else ""
        text = [_unescape(re.sub(r"<[^>]*>", "", line)) for line in block[skip + 1 :]]
        captions += _cue(path, number + skip, times, text)
    return captions


def _parse_jsonl(path: str, lines: list[str]) -> list[Caption]:
    captions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            lag = None if row.get("lag") is None else float(row["lag"])
            captions.append(Caption(float(row["start"]), float(row["end"]), str(row["text"]), lag))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number}: write one {{"start": 0.0, "end": 1.0, "text": "..."}} per line.'
            ) from error
    return captions


@dataclass(frozen=True)
class SubtitleFormat:
    """How a caption file is written and read.

    Attributes:
        head: What the file begins with.
        record: One caption of a `tidy` list, numbered from 1, as text that ends with `mark`.
        mark: The end of a record, found nowhere else in it.
        parse: The captions of (path, lines).
    """

    head: str
    record: Callable[[Caption, int], str]
    mark: bytes
    parse: Callable[[str, list[str]], list[Caption]]


FORMATS = {
    ".srt": SubtitleFormat("", _srt_record, b"\n\n", _parse_srt),
    ".vtt": SubtitleFormat("WEBVTT\n\n", _vtt_record, b"\n\n", _parse_vtt),
    ".jsonl": SubtitleFormat("", _json_record, b"\n", _parse_jsonl),
}


def format_of(path: str | os.PathLike[str]) -> SubtitleFormat:
    """The format of a file's ending. Raises UserError for another ending."""
    found = FORMATS.get(Path(path).suffix.lower())
    if found is None:
        raise UserError(f"{path} is no caption file: let it end in {', '.join(FORMATS)}.")
    return found


def _lines(text: str) -> list[str]:
    """The non-blank lines of a text, stripped, with nothing in them that a subtitle file cannot hold."""
    lines = []
    for line in re.split(r"\r\n|\r|\n", text):
        plain = "".join(" " if unicodedata.category(ch) == "Cc" else ch for ch in line)
        plain = plain.encode("utf-8", "replace").decode("utf-8").strip("\ufeff").strip()
        if plain:
            lines.append(plain)
    return lines


def _clock(seconds: float, point: str) -> str:
    """59.9996 -> 00:01:00,000. Rounded before it is split, so that no field ever shows 60 or 1000."""
    rest, ms = divmod(round(seconds * 1000), 1000)
    rest, s = divmod(rest, 60)
    h, m = divmod(rest, 60)
    return f"{h:02d}:{m:02d}:{s:02d}{point}{ms:03d}"


_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$", re.ASCII)


def _cue(path: str, number: int, times: str, text: list[str]) -> list[Caption]:
    match = _TIMES.match(times)
    if match is None:
        raise UserError(f"{path}, line {number}: write the times of a caption as 00:00:01.000 --> 00:00:02.000.")
    lines = _lines("\n".join(text))
    if not lines:
        return []
    try:
        return [Caption(_seconds(match.groups()[:4]), _seconds(match.groups()[4:]), "\n".join(lines))]
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from error


def _seconds(fields: Sequence[str | None]) -> float:
    h, m, s, fraction = (field or "0" for field in fields)
    return ((int(h) * 60 + int(m)) * 60_000 + int(s) * 1000 + int(fraction.ljust(3, "0"))) / 1000


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Runs of non-blank lines, each with the number of its first line, counted from 1."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), block
            block = []


def _unescape(text: str) -> str:
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0")
    # last, so that "&amp;lt;" gives "&lt;"
    return text.replace("&amp;", "&")
