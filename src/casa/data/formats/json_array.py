"""A JSON file: a list of rows, as LLaVA's are, read one row at a time; or, under that name, JSON lines.

Rows are found by the decoder itself, so that a file of gigabytes is never in memory whole. After a row that is no JSON
nobody knows where the next begins: the rest of the file is one bad row.
"""

import io
import json
from collections.abc import Callable, Iterator

from casa.data.bad import BadRecord
from casa.data.formats.jsonl import BOM, parsed, read_jsonl_rows
from casa.data.formats.row import LONGEST, Cursor, Piece, Row, open_file

_CHUNK = 1 << 20  # characters
_BLANK = " \t\r\n"


def read_json_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The rows from `cursor` on; a row's line is the one where it begins, and its number in the list its entry."""
    with open_file(piece.path) as file:
        first = file.readline(_CHUNK).removeprefix(BOM)
    if first.lstrip()[:1] != b"[" and first.strip() and not isinstance(parsed(first), BadRecord):
        yield from read_jsonl_rows(piece, cursor, mine)
        return
    with open_file(piece.path) as binary:
        # bytes that are no UTF-8 become halves of characters, which the shapes refuse by row
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for number, (line, value, size) in enumerate(_values(_Text(text)), start=1):
            if number > cursor[0] and mine(number - 1):
                # a bad value is always the last: see `_values`
                bad = isinstance(value, BadRecord)
                # a whole list may stand on one line
                yield Row(line, value, size, (number, 0), last=bad, entry=f"row {number}")


class _Text:
    """A text of which only the part being decoded is kept. at: the next character of `held`. whole: all is read."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self.held, self.at, self.whole = "", 0, False
        # the line of the character up to which line ends were counted
        self._line, self._counted = 1, 0

    def more(self) -> bool:
        """Reads on, as much again as is held; False at the end of the file."""
        self.line()
        self.held, self.at, self._counted = self.held[self.at :], 0, 0
        read = self._file.read(max(_CHUNK, len(self.held)))
        self.held += read
        self.whole = not read
        return not self.whole

    def peek(self) -> str:
        """The next character that is no blank, or "" at the end."""
        while True:
            while self.at < len(self.held):
                if self.held[self.at] not in _BLANK:
                    return self.held[self.at]
                self.at += 1
            if not self.more():
                return ""

    def line(self) -> int:
        """The line of the next character, from 1."""
        self._line += self.held.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line


def _values(text: _Text) -> Iterator[tuple[int, object, int]]:
    """(line, value or BadRecord, characters) of every entry of a list, or of values one after another."""
    decode = json.JSONDecoder().raw_decode
    listed = text.peek() == "["
    text.at += listed
    while (mark := text.peek()) and mark != "]":
        # what was read is dropped now and then, not at every row
        if text.at > _CHUNK:
            text.more()
        line = text.line()
        while True:
            try:
                value, end = decode(text.held, text.at)
                # a value that touches the end of what is held may go on behind it
                if end == len(text.held) and not text.whole:
                    text.more()
                    continue
            except (ValueError, RecursionError):
                if len(text.held) < LONGEST and text.more():
                    continue
                yield line, BadRecord("not-json", "From here on the file is no JSON, or cut off: mend it."), 0
                return
            break
        yield line, value, end - text.at
        text.at = end
        if listed and text.peek() == ",":
            text.at += 1
        elif listed and text.peek() != "]":
            bad = BadRecord("not-json", "The list of rows does not go on with a comma or end with ]: mend it.")
            yield text.line(), bad, 0
            return
    if listed and mark != "]":
        yield text.line(), BadRecord("not-json", "The file ends within its list of rows: copy it again."), 0
