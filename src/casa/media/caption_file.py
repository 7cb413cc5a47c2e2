"""Captions written as they are said: what was said before a kill is on disk, in a file that is valid at every moment.

Each caption is one write at the end of the file. When a caption begins while another is on screen, the end of that one
is corrected in place, in one write too. So at any moment the file is what `write_captions` would make of the captions
so far. What stands behind the last record's mark was cut off in writing, and `resume` drops it.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Self

from casa.errors import UserError
from casa.media.subtitles import Caption, format_of, read_captions, tidy


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
