"""What a record is: messages of text and pictures, with times where there are any. And why a row may be none.

Every format that people have (docs/data.md) is read into a `Record`, and tokens, packing and training start from it. It
holds where its pictures are, not the pictures: they are opened when a sample is made of it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from casa.errors import UserError

Role = Literal["system", "user", "assistant"]

# Every reason for which a record is passed over; reports count by these names.
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
MAX_LINES = 100_000  # of a report's file; beyond, bad records are counted only
MAX_KEPT = 200  # bad records that a report keeps in memory


@dataclass(frozen=True)
class Origin:
    """Where a record was read: the file, and its line or row there, counted from 1.

    Attributes:
        entry: Which of a line's entries it is, or its own name, where the number alone does not tell: "row 17" of a
            JSON list that may stand on one line, the key of a WebDataset sample.
    """

    path: str
    line: int
    entry: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" + (f", {self.entry}" if self.entry else "")


@dataclass(frozen=True)
class Text:
    """Some words. start, end: seconds in the video during which they are said, where the data tell."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Picture:
    """A picture: a path, or the bytes of an encoded file (PNG, JPEG, WebP, ...). time: its second in the video."""

    source: Path | bytes
    time: float | None = None


@dataclass(frozen=True)
class Message:
    """What one side says, in order. The model learns what assistants say, unless `learn` is false: such an earlier
    answer is only read."""

    role: Role
    parts: tuple[Text | Picture, ...]
    learn: bool = True

    @property
    def text(self) -> str:
        """All words of the message."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Record:
    """One conversation, or one video with its words.

    Attributes:
        references: Every answer that the data accept, as often as it was given. One is learned; all are there for
            metrics.
    """

    messages: tuple[Message, ...]
    origin: Origin
    references: tuple[str, ...] = ()

    def pictures(self) -> Iterator[Picture]:
        """All pictures in the order in which the model meets them."""
        for message in self.messages:
            yield from (part for part in message.parts if isinstance(part, Picture))

    @property
    def is_live(self) -> bool:
        """Whether an assistant's words stand among frames with times."""
        said = (part for message in self.messages if message.role == "assistant" for part in message.parts)
        return any(isinstance(part, Picture) and part.time is not None for part in said)


class BadRecord(ValueError):  # noqa: N818  it names the record, as users' reports do
    """A row, or record, that cannot be learned from. reason: a key of `REASONS`. str(): one plain sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadRecord"], tuple[str, str]]:
        # exceptions are rebuilt from their arguments when they cross processes
        return type(self), (self.reason, str(self))


class NoRecord(Exception):  # noqa: N818  it names the row
    """A row that holds no record by its nature, such as an index behind the records. It is not counted."""


class BadRecordReport:
    """Counts bad records by reason, and writes one line of JSON per record to a file, if one is named.

        {"origin": "pages.jsonl:17", "reason": "missing-picture", "why": "There is no file a.png: ..."}

    Lines are appended as records are met, each origin once, at most `MAX_LINES`. A report that cannot be written does
    not stop a run: `unwritten` then says why.

    Args:
        path: The file; None counts only.
        strict: A bad record raises UserError.
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
        return self.counts.total()

    def add(self, origin: Origin, bad: BadRecord) -> None:
        """Counts and names one. Raises UserError, with its place, where the report is strict."""
        if self.strict:
            raise UserError(f"{origin}: {bad}") from bad
        self.counts[bad.reason] += 1
        if len(self.first) < MAX_KEPT:
            self.first.append((origin, bad))
        if self._path is None or self.unwritten is not None:
            return
        try:
            self._write(self._path, str(origin), bad)
        except OSError as error:
            self.unwritten = f"{self._path} cannot be written ({error.strerror})"

    def _write(self, path: Path, origin: str, bad: BadRecord) -> None:
        if self._named is None:
            held = path.read_bytes() if path.exists() else b""
            self._named = {named for named, _ in read_report(held)}
            if held and not held.endswith(b"\n"):
                with path.open("ab") as file:
                    file.write(b"\n")
        if origin in self._named or len(self._named) >= MAX_LINES:
            return
        line = json.dumps({"origin": origin, "reason": bad.reason, "why": str(bad)}, ensure_ascii=False) + "\n"
        with path.open("ab") as file:
            # one call, so that a reader never sees, and a crash rarely leaves, half a line
            file.write(line.encode("utf-8", "replace"))
        self._named.add(origin)


def read_report(data: bytes) -> Iterator[tuple[str, str]]:
    """(origin, reason) of every whole line in the bytes of a report's file; half lines are passed over."""
    # texts may hold characters that Python counts as line ends, such as U+2028: only this one ends a line here
    for line in data.split(b"\n"):
        try:
            entry = json.loads(line)
            named = str(entry["origin"]), str(entry["reason"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        yield named


def first_line(error: Exception) -> str:
    """The first line of what an error says, short enough for a sentence."""
    return str(error).strip().split("\n")[0][:120].rstrip(".") or type(error).__name__
