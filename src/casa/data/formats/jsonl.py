"""JSON lines: one row per line. A bad line is one bad row, and the next line is read as if nothing had happened."""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from casa.data.bad import BadRecord
from casa.data.formats.row import LONGEST, Cursor, Piece, Row, open_file

BOM = b"\xef\xbb\xbf"


def read_jsonl_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The rows from `cursor` on; blank lines count as lines, and are no rows."""
    number, offset = cursor
    with open_file(piece.path) as file:
        file.seek(offset)
        for line in _lines(file):
            number += 1
            offset += len(line) if isinstance(line, bytes) else line
            if not mine(number - 1):
                continue
            if not isinstance(line, bytes):
                bad = BadRecord(
                    "too-long", f"The line has more than {LONGEST // 2**20} MiB: split the file at its rows."
                )
                yield Row(number, bad, 0, (number, offset))
                continue
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield Row(number, parsed(line), len(line), (number, offset))


def parsed(line: bytes) -> Any:
    """The value of a line, or a BadRecord."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return BadRecord("not-json", "The line is not UTF-8: save the file as UTF-8.")
    except (ValueError, RecursionError) as error:
        ended = "" if line.endswith(b"\n") else ", and the file ends here"
        reason = getattr(error, "msg", "too deeply nested" if isinstance(error, RecursionError) else "a bad number")
        return BadRecord(
            "not-json", f"The line is no JSON ({reason[:1].lower()}{reason[1:]}){ended}: mend or remove it."
        )


def _lines(file: BinaryIO) -> Iterator[bytes | int]:
    """Lines with their ends; of one that is too long only its length in bytes."""
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := file.readline(LONGEST)):
            length += len(line)
        yield length
