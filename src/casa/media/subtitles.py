"""Captions as files: SubRip (.srt), WebVTT (.vtt) and one JSON object per line (.jsonl), out and in.

All three writers write `tidy(captions)`, so the three files of one video agree, and reading one gives
`tidy(captions)` back.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from casa.atomic import write_text
from casa.errors import UserError


@dataclass(frozen=True)
class Caption:
    """`text` shown from `start` to `end`, in seconds from the beginning of the video.

    lag: of live captions, the seconds from the picture's being there to the text's; only JSONL can hold it.

    Raises:
        ValueError: a time that is negative or not finite, or an end that is not after the start.
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

    A caption still on screen when the next begins ends there. Captions that begin in the same
    millisecond become the lines of one. Blank lines, surrounding blanks, control characters and
    captions without text are dropped, since a blank line would end a subtitle early.
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


def captions_from_frames(
    times: Sequence[float],
    texts: Sequence[str],
    end: float | None = None,
    hold: float = 3.0,
    lags: Sequence[float | None] | None = None,
) -> list[Caption]:
    """Captions from what was said at each frame; silence is an empty text.

    A caption lasts until the next one, at most `hold` seconds, and not beyond `end` (the length of the
    video in seconds; ignored where a frame comes later than that). The same text again while it is
    still on screen keeps it there. lags: of live captions, as in `Caption`.

    Raises:
        ValueError: `times`, `texts` and `lags` differ in length, times do not rise, or `hold` is not positive.
    """
    if len(times) != len(texts):
        raise UserError(f"{len(times)} times for {len(texts)} texts: give one time for each text.")
    if lags is None:
        lags = [None] * len(times)
    if len(lags) != len(times):
        raise UserError(f"{len(lags)} lags for {len(texts)} texts: give one lag for each text, or none.")
    if any(b <= a for a, b in pairwise(times)):
        raise UserError("The times of the frames must rise: sort the frames by time.")
    if not hold > 0:
        raise UserError(f"hold is {hold}: give a number of seconds above 0.")
    spoken = [(time, text.strip(), lag) for time, text, lag in zip(times, texts, lags, strict=True) if text.strip()]
    captions: list[Caption] = []
    for i, (start, text, lag) in enumerate(spoken):
        stop = start + hold
        if i + 1 < len(spoken):
            stop = min(stop, spoken[i + 1][0])
        if end is not None and end > start:
            stop = min(stop, end)
        if captions and captions[-1].text == text and captions[-1].end == start:
            start, lag = captions[-1].start, captions.pop().lag
        captions.append(Caption(start, stop, text, lag))
    return captions


VTT_HEAD = "WEBVTT\n\n"


def srt_cue(caption: Caption, number: int) -> str:
    """One caption of a `tidy` list as SubRip writes it, with the blank line that ends it. number: from 1."""
    return f"{number}\n{_clock(caption.start, ',')} --> {_clock(caption.end, ',')}\n{caption.text}\n\n"


def vtt_cue(caption: Caption, number: int = 0) -> str:
    """One caption of a `tidy` list as WebVTT writes it, with the blank line that ends it."""
    return f"{_clock(caption.start, '.')} --> {_clock(caption.end, '.')}\n{_escape(caption.text)}\n\n"


def json_line(caption: Caption, number: int = 0) -> str:
    """One caption of a `tidy` list as a line of JSON."""
    row = {"start": caption.start, "end": caption.end, "text": caption.text}
    row |= {} if caption.lag is None else {"lag": round(caption.lag, 3)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def srt_text(captions: Iterable[Caption]) -> str:
    """All of a SubRip file. SubRip knows no escapes: players may read `<i>` as italics."""
    return "".join(srt_cue(c, i) for i, c in enumerate(tidy(captions), start=1))


def vtt_text(captions: Iterable[Caption]) -> str:
    """All of a WebVTT file; `&`, `<` and `>` (so `-->` too) are escaped."""
    return VTT_HEAD + "".join(vtt_cue(c) for c in tidy(captions))


def jsonl_text(captions: Iterable[Caption]) -> str:
    """One `{"start": seconds, "end": seconds, "text": "..."}` per line; `lag` where known."""
    return "".join(json_line(c) for c in tidy(captions))


def write_srt(path: str | os.PathLike[str], captions: Iterable[Caption]) -> None:
    """Write `srt_text`, UTF-8, whole or not at all.

    Raises:
        UserError: the file cannot be written there.
    """
    write_text(path, srt_text(captions))


def write_vtt(path: str | os.PathLike[str], captions: Iterable[Caption]) -> None:
    """Write `vtt_text`, UTF-8, whole or not at all.

    Raises:
        UserError: the file cannot be written there.
    """
    write_text(path, vtt_text(captions))


def write_jsonl(path: str | os.PathLike[str], captions: Iterable[Caption]) -> None:
    """Write `jsonl_text`, UTF-8, whole or not at all.

    Raises:
        UserError: the file cannot be written there.
    """
    write_text(path, jsonl_text(captions))


def read_srt(path: str | os.PathLike[str], data: bytes | None = None) -> list[Caption]:
    """Read SubRip. Numbers may be missing, and cues without text are passed over.

    data: the file's bytes, where they were read already.

    Raises:
        UserError: no such file, not UTF-8, or a cue that has no readable times (its line is named).
    """
    captions = []
    for number, block in _blocks(path, data):
        # a cue's own number; the times stand in the first or the second line, never later
        skip = 1 if len(block) > 1 and block[0].strip().isdigit() else 0
        captions += _cue(path, number + skip, block[skip], block[skip + 1 :])
    return captions


def read_vtt(path: str | os.PathLike[str], data: bytes | None = None) -> list[Caption]:
    """Read WebVTT; comments, styles, cue names, cue settings and tags such as `<v Ann>` are passed over.

    data: as for `read_srt`.

    Raises:
        UserError: no such file, not UTF-8, no WEBVTT heading, or a cue without readable times.
    """
    blocks = _blocks(path, data)
    if not blocks or not re.match(r"WEBVTT($|[ \t])", blocks[0][1][0]):
        raise UserError(f"{path} does not begin with WEBVTT: name a .vtt file.")
    captions = []
    for number, block in blocks[1:]:
        if re.match(r"(NOTE|STYLE|REGION)($|\s)", block[0]):
            continue
        skip = 0 if "-->" in block[0] else 1
        times = block[skip] if skip < len(block) else ""
        text = [_unescape(re.sub(r"<[^>]*>", "", line)) for line in block[skip + 1 :]]
        captions += _cue(path, number + skip, times, text)
    return captions


def read_jsonl(path: str | os.PathLike[str], data: bytes | None = None) -> list[Caption]:
    """Read what `write_jsonl` wrote; further keys are passed over. data: as for `read_srt`.

    Raises:
        UserError: no such file, not UTF-8, or a line that is no such object (it is named).
    """
    captions = []
    for number, line in enumerate(_read(path, data).split("\n"), start=1):
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


def _cue(path: object, number: int, times: str, text: list[str]) -> list[Caption]:
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


def _blocks(path: str | os.PathLike[str], data: bytes | None) -> list[tuple[int, list[str]]]:
    """Runs of non-blank lines, each with the number of its first line, counted from 1."""
    blocks: list[tuple[int, list[str]]] = []
    previous_blank = True
    for number, line in enumerate(_read(path, data).split("\n"), start=1):
        blank = not line.strip()
        if not blank and previous_blank:
            blocks.append((number, []))
        if not blank:
            blocks[-1][1].append(line)
        previous_blank = blank
    return blocks


def _read(path: str | os.PathLike[str], data: bytes | None) -> str:
    try:
        text = (Path(path).read_bytes() if data is None else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _unescape(text: str) -> str:
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u00a0")
    # last, so that "&amp;lt;" gives "&lt;"
    return text.replace("&amp;", "&")
