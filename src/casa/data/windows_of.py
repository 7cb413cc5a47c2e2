"""Which text of a record can look at which of its pictures: the windows that training will cut, before any tokens.

user       [a] [b] What differs?      window 1: a b
assistant  The hat.                   window 1
user       [c] And here?              window 2: c
assistant  [0.0 s] One [0.5 s] two    every frame opens one of its own, where frames and words alternate
"""

from dataclasses import dataclass, field

from casa.data.record import Picture, Record

UNLEARNED = "assistant, not learned"


@dataclass
class Window:
    """pictures: numbers of the record's pictures, from 0. said: (who, words), in order. Both may be empty.

    An assistant whose words are read but not learned is `UNLEARNED`.
    """

    pictures: list[int] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)


def windows_of(record: Record) -> list[Window]:
    """The windows of a record in order; text before the first picture is one without pictures."""
    windows = [Window()]
    number = 0
    for message in record.messages:
        # pictures of two messages have the messages' border between them
        in_run = False
        who = message.role if message.learn or message.role != "assistant" else UNLEARNED
        for part in message.parts:
            if isinstance(part, Picture):
                if not in_run or message.role == "assistant":
                    windows.append(Window())
                windows[-1].pictures.append(number)
                number += 1
                in_run = True
            else:
                windows[-1].said.append((who, part.text))
                in_run = False
    return [window for window in windows if window.pictures or window.said]
