"""Bad records: why a row cannot be learned from, and the report that counts them and says where they are."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casa.data.record import Origin
from casa.errors import UserError

# Every reason for which a record is passed over; the word before the dash is what reports count by.
REASONS = {
    "not-json": "a line that is no JSON, or a file that ends within a row",
    "wrong-type": "a value of another kind than its shape says",
    "unknown-shape": "keys that fit no shape, or several",
    "unfollowed-field": "a field that changes what is learned, and cannot be followed",
    "missing-picture": "a picture or video that is not there",
    "unreadable-picture": "a picture that is empty, damaged, cut off or too large",
    "unreadable-video": "a video that cannot be read",
    "damaged-video": "a video of which more than a tenth is damaged or cut off",
    "outside": "a path that leads out of the root",
    "picture-without-tag": "more pictures than places for them in the text",
    "tag-without-picture": "a place for a picture, and no picture",
    "empty-answer": "an assistant's turn without words, or no such turn",
    "empty-question": "a user's turn with neither words nor pictures",
    "broken-text": "half of a character, which no tokenizer can read",
    "too-long": "a line, or a video, beyond what is read at once",
    "over-budget": "more text or image tokens than a pack holds, where that is refused",
    "unreadable-file": "a file, or the rest of one, that cannot be read",
}
# Lines that a report's file holds at most; beyond, bad records are counted only.
MOST_LINES = 100_000
# Bad records that are kept in memory too.
MOST_KEPT = 200


class BadRecord(ValueError):  # noqa: N818  it names the record, as users' reports do
    """A row, or record, that cannot be learned from. reason: a key of `REASONS`. str(): one plain sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # exceptions are rebuilt from their arguments when they cross processes
        return type(self), (self.reason, str(self))


class NoRecord(Exception):  # noqa: N818  it names the row
    """A row that holds no record and never did, such as an index behind the records: passed over, and not counted."""


def said_by(error: Exception) -> str:
    """The first line of what an error says, short enough for a sentence."""
    return str(error).strip().split("\n")[0][:120].rstrip(".") or type(error).__name__


class Report:
    """Counts bad records by reason, and writes one line of JSON per record to a file, if one is named.

        {"origin": "pages.jsonl:17", "reason": "missing-picture", "why": "There is no file a.png: ..."}

    counts: by reason. first: the first `MOST_KEPT`. Lines are appended as records are met, each origin once, at most
    `MOST_LINES`; memory is bounded by that. A report that cannot be written does not stop a run: `unwritten` then says
    why. strict: a bad record raises UserError.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, strict: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[tuple[Origin, BadRecord]] = []
        self.strict = strict
        self.unwritten: str | None = None
        self._path = None if path is None else Path(path)
        self._named: set[str] | None = None

    @property
    def total(self) -> int:
        """How many bad records were met so far."""
        return sum(self.counts.values())

    def add(self, origin: Origin, bad: BadRecord) -> None:
        """Counts and names one. Raises UserError, with its place, where the report is strict."""
        if self.strict:
            raise UserError(f"{origin}: {bad}") from bad
        self.counts[bad.reason] += 1
        if len(self.first) < MOST_KEPT:
            self.first.append((origin, bad))
        if self._path is not None and self.unwritten is None:
            self._write(self._path, str(origin), bad)

    def _write(self, path: Path, origin: str, bad: BadRecord) -> None:
        try:
            if self._named is None:
                self._named = _named_in(path)
            if origin in self._named or len(self._named) >= MOST_LINES:
                return
            line = json.dumps({"origin": origin, "reason": bad.reason, "why": str(bad)}, ensure_ascii=False) + "\n"
            with path.open("ab") as file:
                # one call, so that a reader never sees, and a crash rarely leaves, half a line
                file.write(line.encode("utf-8", "replace"))
            self._named.add(origin)
        except OSError as error:
            self.unwritten = f"{path} cannot be written ({error.strerror})"


def reported(data: bytes) -> Iterator[tuple[str, str]]:
    """(origin, reason) of every whole line in the bytes of a report's file; half lines are passed over."""
    # texts may hold characters that Python counts as line ends, such as U+2028: only this one ends a line here
    for line in data.split(b"\n"):
        try:
            entry = json.loads(line)
            named = str(entry["origin"]), str(entry["reason"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        yield named


def _named_in(path: Path) -> set[str]:
    """The origins that a report from before names, and a line end after its last line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    if data and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return {origin for origin, _ in reported(data)}
