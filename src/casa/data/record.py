"""One shape for all training data: messages of text and pictures, with times where there are any.

Every format that people have (docs/data.md) is read into this, and everything after it (tokens, packing,
training) starts from it. A record holds where its pictures are, not the pictures: they are opened when a sample
is made of it, in the process that makes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Origin:
    """Where a record was read: the file, and its line or row there, counted from 1.

    entry: which of a line's entries it is, or its own name, where the number alone does not tell: "row 17" of a JSON
    list that may stand on one line, the key of a WebDataset sample.
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
    """What one side says, in order. The model learns what assistants say, but for messages that are not to be
    learned (`learn`): an earlier answer that is only read."""

    role: Role
    parts: tuple[Text | Picture, ...]
    learn: bool = True


@dataclass(frozen=True)
class Record:
    """One conversation, or one video with its words.

    references: every answer that the data accept, where they give several for one question; the first is the one that
    is learned, all of them are there for whoever measures.
    """

    messages: tuple[Message, ...]
    origin: Origin
    references: tuple[str, ...] = ()

    def pictures(self) -> Iterator[Picture]:
        """All pictures in the order in which the model meets them."""
        for message in self.messages:
            for part in message.parts:
                if isinstance(part, Picture):
                    yield part
