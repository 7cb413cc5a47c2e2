"""Captions written as they are said: what was said before a kill is on disk, in a file that is valid at every moment.

Each caption is one write at the end of the file. When a caption begins while another is on screen, the end of that one
is corrected in place, in one write too. So at any moment the file is what `write_srt`, `write_vtt` or `write_jsonl`
would make of the captions so far.

A finished record ends with its mark (a blank line; in JSONL the line's end). What stands behind the last mark was cut
off in writing, and `resume` drops it.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self

from casa.errors import UserError
from casa.media.subtitles import (
    VTT_HEAD,
    Caption,
    json_line,
    read_jsonl,
    read_srt,
    read_vtt,
    srt_cue,
    tidy,
    vtt_cue,
)

# suffix: (what the file begins with, one record, the mark at its end, the reader)
_KINDS = {
    ".srt": ("", srt_cue, b"\n\n", read_srt),
    ".vtt": (VTT_HEAD, vtt_cue, b"\n\n", read_vtt),
    ".jsonl": ("", json_line, b"\n", read_jsonl),
}


class CaptionWriter(Protocol):
    """Takes captions as they are said."""

    def say(self, start: float, end: float, text: str, lag: float | None = None) -> None:
        """`text` is on screen from `start` to `end` seconds, or until the next one; starts never go back.

        The same text again while it is on screen keeps it there; a text that is blank is silence, and nothing is done.
        lag: seconds by which a live caption came after its picture.
        """
        ...

    def close(self, end: float | None = None) -> None:
        """No more captions; with `end`, the length of the video in seconds, the last one stops there."""
        ...


class _Saying:
    """What all writers share: the rules of `tidy`, for one caption at a time. `_add` and `_change` write."""

    def __init__(self) -> None:
        self._last: Caption | None = None

    def say(self, start: float, end: float, text: str, lag: float | None = None) -> None:
        """See `CaptionWriter`. Raises UserError for impossible times, and a start before the last one."""
        found = tidy([Caption(start, end, text, lag)])
        if not found:
            return
        said, last = found[0], self._last
        if last is None or said.start > last.end:
            self._new(said)
        elif said.start < last.start:
            raise UserError(f"A caption at {start} s comes after one at {last.start} s: say them in order.")
        elif said.text == last.text:
            self._corrected(replace(last, end=max(last.end, said.end)))
        elif said.start == last.start:
            self._corrected(replace(last, end=max(last.end, said.end), text=f"{last.text}\n{said.text}"))
        else:
            self._corrected(replace(last, end=said.start))
            self._new(said)

    def close(self, end: float | None = None) -> None:
        """See `CaptionWriter`; may be called again."""
        if end is not None and self._last is not None and self._last.start + 0.001 <= end < self._last.end:
            self._corrected(tidy([replace(self._last, end=end)])[0])

    def _new(self, said: Caption) -> None:
        self._add(said)
        self._last = said

    def _corrected(self, said: Caption) -> None:
        if said != self._last:
            self._change(said)
            self._last = said

    def _add(self, said: Caption) -> None:
        raise NotImplementedError

    def _change(self, said: Caption) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class FileWriter(_Saying):
    """A caption file that grows; what `open_writer` returns."""

    def __init__(self, path: str | os.PathLike[str], resume: bool = False, until: float | None = None) -> None:
        super().__init__()
        suffix = Path(path).suffix.lower()
        if suffix not in _KINDS:
            raise UserError(f"{path} is no caption file: let it end in {', '.join(_KINDS)}.")
        self._path = path
        self._head, self._record, self._mark, self._read = _KINDS[suffix]
        self._number = 0
        kept = self._keep(until) if resume and os.path.exists(path) else []
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): write to another folder.") from error
        try:
            self._size = 0
            # Written over what was there and cut to its length only then: nothing kept is ever off the disk.
            self._write(0, self._head.encode() + b"".join(record for _, record in kept))
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

    def _keep(self, until: float | None) -> list[tuple[Caption, bytes]]:
        """The whole captions on disk that start before `until`, each with its bytes."""
        path = Path(self._path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check its name.") from error
        whole = data[: data.rfind(self._mark) + len(self._mark)] if self._mark in data else b""
        if not whole.strip():
            return []
        captions = self._read(path, whole)
        plain = [self._record(caption, i).encode() for i, caption in enumerate(captions, start=1)]
        # as they are, blanks before the mark and all: a run that is gone on with leaves what one run would have left
        pieces = [piece + self._mark for piece in whole.removeprefix(self._head.encode()).split(self._mark)[:-1]]
        end = len(self._mark)
        ours = [piece[:-end].rstrip(b" ") + self._mark for piece in pieces] == plain
        records = zip(captions, pieces if ours else plain, strict=True)
        return [(caption, record) for caption, record in records if until is None or caption.start < until]

    def _add(self, said: Caption) -> None:
        self._place, self._number = self._size, self._number + 1
        self._write(self._place, self._record(said, self._number).encode())

    def _change(self, said: Caption) -> None:
        record = self._record(said, self._number).encode()
        # one write, so never shorter than what it replaces: blanks before the mark mean nothing in any of the formats
        short = self._size - self._place - len(record)
        self._write(self._place, record.removesuffix(self._mark) + b" " * max(0, short) + self._mark)

    def _write(self, place: int, data: bytes) -> None:
        """Puts `data` there in one call of the system, and ends the file with it. Whole, or not at all."""
        if self._file < 0:
            raise RuntimeError("this caption writer is closed")
        try:
            os.lseek(self._file, place, os.SEEK_SET)
            written = os.write(self._file, data) if data else 0
            if written < len(data):
                os.ftruncate(self._file, self._size)
                raise OSError(0, "the disk is full")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror}): free some space.") from error
        self._size = place + len(data)


class CallbackWriter(_Saying):
    """Calls `function(caption, changed)`: for each new caption, and with changed=True when the last one's end or text
    was corrected."""

    def __init__(self, function: Callable[[Caption, bool], object]) -> None:
        super().__init__()
        self._function = function

    def _add(self, said: Caption) -> None:
        self._function(said, False)

    def _change(self, said: Caption) -> None:
        self._function(said, True)


class ManyWriters:
    """One writer that is several."""

    def __init__(self, writers: Iterable[CaptionWriter]) -> None:
        self._writers = list(writers)

    def say(self, start: float, end: float, text: str, lag: float | None = None) -> None:
        for writer in self._writers:
            writer.say(start, end, text, lag)

    def close(self, end: float | None = None) -> None:
        """Closes all, also when one of them fails."""
        with ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close, end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_writer(path: str | os.PathLike[str], resume: bool = False, until: float | None = None) -> FileWriter:
    """A writer of captions by the file's ending: .srt, .vtt or .jsonl. What was there is replaced.

    With `resume`, what is on disk stays, but for a last caption that was cut off in writing, and numbering goes on;
    until: captions that start at this second or later are dropped too, since they will be said again.

    Raises:
        UserError: another ending, no right to write there, a full disk; with `resume`, a file that is something else.
    """
    return FileWriter(path, resume, until)
