"""A record that is too long for a pack: its pictures made smaller, itself cut into pieces, or refused; each counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from casa.data.record import Message, Picture, Record, Text
from casa.settings import require
from casa.training.samples.live import is_live

TooLong = Literal["split", "refuse"]
TooLarge = Literal["downscale", "split", "refuse"]


@dataclass(frozen=True)
class OversizeSettings:
    """What happens to a record over budget.

    text: with more text than a pack holds. images: with more image tokens; a record that stays too large although its
    pictures were made as small as `least_tokens` each is split.
    """

    text: TooLong = "split"
    images: TooLarge = "downscale"
    least_tokens: int = 16

    def __post_init__(self) -> None:
        require(self.least_tokens >= 1, "least_tokens", self.least_tokens, "1 or more")


@dataclass(frozen=True)
class Piece:
    """A turn (what a user asks and what is answered) or, live, a frame with what is said of it.

    lead: what comes before all pieces: a system message; live, the prompt. lent: the pictures of the last turn before
    that had some, if this one has none: it is about them, most likely.
    """

    record: Record
    lead: tuple[Message, ...]
    messages: tuple[Message, ...]
    lent: tuple[Picture, ...] = ()


def pieces_of(record: Record) -> list[Piece]:
    """The smallest pieces that a record can be cut into."""
    return _frames(record) if is_live(record.messages) else _turns(record)


def join(pieces: Sequence[Piece]) -> Record:
    """Neighbouring pieces as one record. Pictures are lent to the first only: they then stand before all others."""
    first = pieces[0]
    if is_live(first.messages):
        said = Message("assistant", tuple(part for piece in pieces for part in piece.messages[0].parts))
        return replace(first.record, messages=(*first.lead, said))
    opening = first.messages[0]
    opening = Message(opening.role, (*first.lent, *opening.parts))
    later = [message for piece in pieces[1:] for message in piece.messages]
    return replace(first.record, messages=(*first.lead, opening, *first.messages[1:], *later))


def split(record: Record, fits: Callable[[Record], bool]) -> list[Record]:
    """Runs of pieces, each as long as fits; a piece that does not fit alone stands alone."""
    pieces, found, start, low = pieces_of(record), [], 0, 1
    while start < len(pieces):
        left = len(pieces) - start
        # neighbours are alike: the last run's length is where to look first, and nothing much longer is tried
        high = min(low, left)
        low = 1
        while high < left and fits(join(pieces[start : start + high])):
            low, high = high, min(2 * high, left)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(join(pieces[start : start + middle])) else (low, middle - 1)
        found.append(join(pieces[start : start + low]))
        start += low
    return found


def _turns(record: Record) -> list[Piece]:
    lead: list[Message] = []
    turns: list[list[Message]] = []
    for message in record.messages:
        if message.role == "system" and not turns:
            lead.append(message)
        elif not turns or (message.role == "user" and any(m.role == "assistant" for m in turns[-1])):
            turns.append([message])
        else:
            turns[-1].append(message)
    found: list[Piece] = []
    shown: tuple[Picture, ...] = ()
    for turn in turns:
        own = tuple(part for message in turn for part in message.parts if isinstance(part, Picture))
        found.append(Piece(record, tuple(lead), tuple(turn), () if own else shown))
        shown = own or shown
    return found


def _frames(record: Record) -> list[Piece]:
    """Questions in mid-stream are left out."""
    lead: list[Message] = []
    for message in record.messages:
        if message.role == "assistant":
            break
        lead.append(message)
    frames: list[list[Text | Picture]] = []
    early: list[Text | Picture] = []
    for part in (part for message in record.messages if message.role == "assistant" for part in message.parts):
        if isinstance(part, Picture):
            frames.append([part, *early])
            early = []
        else:
            (frames[-1] if frames else early).append(part)
    return [Piece(record, tuple(lead), (Message("assistant", tuple(frame)),)) for frame in frames]
