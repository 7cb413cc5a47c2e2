"""Captions and their files: SubRip (.srt), WebVTT (.vtt) and one JSON object per line (.jsonl), out and in.

Every format writes `tidy(captions)`, so the files of one video agree, and reading one gives `tidy(captions)` back. A
`CaptionFile` is that at every moment while captions are said.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

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


class CaptionList:
    """Captions as they are said, by the rules of `tidy`; `captions` holds them."""

    def __init__(self) -> None:
        self.captions: list[Caption] = []
        self._last: Caption | None = None

    def say(self, start: float, end: float, text: str, lag: float | None = None) -> None:
        """Adds a caption, on screen from `start` to `end` seconds, or until the next one.

        The same text again while it is on screen keeps it there. Blank text is silence, and nothing is done.

        Args:
            start: Never before the last caption's.
            end: After `start`.
            text: What is said.
            lag: Seconds by which a live caption came after its picture.

        Raises:
            UserError: The times are impossible, `start` is before the last one, or the disk is full.
        """
        found = tidy([Caption(start, end, text, lag)])
        if not found:
            return
        said, last = found[0], self._last
        if last is None or said.start > last.end:
            self._set(said, is_new=True)
        elif said.start < last.start:
            raise UserError(f"A caption at {start} s comes after one at {last.start} s: say them in order.")
        elif said.text == last.text:
            self._set(replace(last, end=max(last.end, said.end)))
        elif said.start == last.start:
            self._set(replace(last, end=max(last.end, said.end), text=f"{last.text}\n{said.text}"))
        else:
            self._set(replace(last, end=said.start))
            self._set(said, is_new=True)

    def close(self, end: float | None = None) -> None:
        """Ends the list; with `end`, the video's length in seconds, the last caption stops there. May be repeated."""
        if end is not None and self._last is not None and self._last.start + 0.001 <= end < self._last.end:
            self._set(tidy([replace(self._last, end=end)])[0])

    def _set(self, said: Caption, is_new: bool = False) -> None:
        if is_new or said != self._last:
            self._put(said, is_new)
            self._last = said

    def _put(self, said: Caption, is_new: bool) -> None:
        """Adds a caption, or puts it in the place of the last one."""
        if not is_new:
            self.captions.pop()
        self.captions.append(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def captions_from_frames(
    times: Sequence[float],
    texts: Sequence[str],
    end: float | None = None,
    hold: float = 3.0,
    lags: Sequence[float | None] | None = None,
) -> list[Caption]:
    """Makes captions of what was said at each frame, by the rules of `CaptionList`.

    Args:
        times: Seconds of the frames, rising.
        texts: What was said at each; silence is an empty text.
        end: Seconds of the whole video, where the last caption ends at the latest; ignored if it begins after it.
        hold: Seconds that a caption stays if no other comes.
        lags: Of live captions, as in `Caption`.

    Raises:
        UserError: `times`, `texts` and `lags` differ in length, times do not rise, or `hold` is not positive.
    """
    lags = [None] * len(times) if lags is None else lags
    if not len(times) == len(texts) == len(lags):
        raise UserError(f"{len(times)} times and {len(lags)} lags for {len(texts)} texts: give one for each text.")
    if any(b <= a for a, b in pairwise(times)):
        raise UserError("The times of the frames must rise: sort the frames by time.")
    if not hold > 0:
        raise UserError(f"hold is {hold}: give a number of seconds above 0.", field="hold")
    said = CaptionList()
    for time, text, lag in zip(times, texts, lags, strict=True):
        said.say(time, time + hold, text, lag)
    said.close(end)
    return said.captions


class CaptionFile(CaptionList):
    """A caption file that grows with each `say`; `captions` stays empty.

    Each caption is one write at the end of the file. When one begins while another is on screen, the end of that one is
    corrected in place, in one write too: what was said before a kill is on disk, in a file that is valid.

    Args:
        path: Ends in .srt, .vtt or .jsonl. What was there is replaced.
        resume: Keep what is on disk, but for a last caption that was cut off in writing, and go on numbering.
        until: With `resume`, drop the captions that start at this second or later: they will be said again.

    Raises:
        UserError: Another ending, no right to write there, a full disk; with `resume`, a file that is something else.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False, until: float | None = None) -> None:
        super().__init__()
        self._path, self._format = path, format_of(path)
        self._number = self._size = self._place = 0  # of the last record, the file, the last record's beginning
        kept = self._kept(until) if resume and os.path.exists(path) else []
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): write to another folder.") from error
        try:
            # Written over what was there and cut to its length only then: nothing kept is ever off the disk.
            self._write(0, self._format.head.encode() + b"".join(record for _, record in kept))
            for caption, record in kept[-1:]:
                self._last, self._number, self._place = caption, len(kept), self._size - len(record)
            os.ftruncate(self._file, self._size)
        except BaseException:
            os.close(self._file)
            raise

    def close(self, end: float | None = None) -> None:
        if self._file < 0:
            return
        try:
            super().close(end)
        finally:
            os.close(self._file)
            self._file = -1

    def _kept(self, until: float | None) -> list[tuple[Caption, bytes]]:
        """The whole captions on disk that start before `until`, each with its bytes."""
        try:
            data = Path(self._path).read_bytes()
        except OSError as error:
            raise UserError(f"{self._path} cannot be read ({error.strerror}): check its name.") from error
        mark = self._format.mark
        whole = data[: data.rfind(mark) + len(mark)] if mark in data else b""
        if not whole.strip():
            return []
        captions = read_captions(self._path, whole)
        plain = [self._format.record(caption, i).encode() for i, caption in enumerate(captions, start=1)]
        # as they are, blanks before the mark and all: a run that is gone on with leaves what one run would have left
        pieces = whole.removeprefix(self._format.head.encode()).split(mark)[:-1]
        ours = [piece.rstrip(b" ") + mark for piece in pieces] == plain
        records = zip(captions, [piece + mark for piece in pieces] if ours else plain, strict=True)
        return [(caption, record) for caption, record in records if until is None or caption.start < until]

    def _put(self, said: Caption, is_new: bool) -> None:
        self._place, self._number = (self._size, self._number + 1) if is_new else (self._place, self._number)
        record, mark = self._format.record(said, self._number).encode(), self._format.mark
        # one write, so never shorter than what it replaces: blanks before the mark mean nothing in any of the formats
        short = self._size - self._place - len(record)
        self._write(self._place, record.removesuffix(mark) + b" " * max(0, short) + mark)

    def _write(self, place: int, data: bytes) -> None:
        """Puts `data` there in one call of the system, and ends the file with it. Whole, or not at all."""
        if self._file < 0:
            raise RuntimeError("this caption file is closed")
        try:
            os.lseek(self._file, place, os.SEEK_SET)
            written = os.write(self._file, data) if data else 0
            if written < len(data):
                os.ftruncate(self._file, self._size)
                raise OSError(0, "the disk is full")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror}): free some space.") from error
        self._size = place + len(data)
