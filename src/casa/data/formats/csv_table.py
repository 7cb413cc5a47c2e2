"""Tables as CSV or TSV with a header: commas, semicolons or tabs, whichever the header has most of.

Cells may hold line ends in quotes; a row's line is the one where it ends.
"""

import csv
from collections.abc import Callable, Iterator
from typing import BinaryIO

from casa.data.bad import BadRecord
from casa.data.formats.jsonl import BOM
from casa.data.formats.row import LONGEST, Cursor, Piece, Row, open_file


def read_csv_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The rows from `cursor` on, as dicts of text."""
    with open_file(piece.path) as file:
        lines = _Lines(file)
        first = next(lines, "")
        delimiter = max(",;\t", key=first.count)
        # a header may hold line ends too, in quotes
        header = next(csv.reader(_again(first, lines), delimiter=delimiter), [])
        number = cursor[0]
        if number:
            # the reader takes no line before it needs it, so a row's end is where the file is
            line = _line_at(file, cursor[1])
            file.seek(cursor[1])
            lines = _Lines(file, cursor[1], line)
        rows = csv.reader(lines, delimiter=delimiter)
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                cells = BadRecord("too-long", f"The row cannot be read ({error}): look for a quote that is not closed.")
            if cells is None:
                return
            if cells == []:
                continue
            number += 1
            if not mine(number - 1):
                continue
            value: object = cells
            if not isinstance(cells, BadRecord):
                value = _paired(header, cells)
            size = sum(map(len, cells)) if isinstance(cells, list) else 0
            yield Row(lines.number, value, size, (number, lines.offset))


def _paired(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        counts = f"{len(cells)} cells, and the header {len(header)}"
        return BadRecord("wrong-type", f"The row has {counts}: put text with commas in quotes.")
    return dict(zip(header, cells, strict=True))


class _Lines(Iterator[str]):
    """Lines of a file as text, one taken at a time. offset: bytes taken; number: lines taken."""

    def __init__(self, file: BinaryIO, offset: int = 0, number: int = 0) -> None:
        self._file = file
        self.offset, self.number = offset, number

    def __next__(self) -> str:
        line = self._file.readline(LONGEST)
        if not line:
            raise StopIteration
        start = self.offset == 0
        self.offset += len(line)
        self.number += 1
        # bytes that are no UTF-8 become halves of characters, which the shapes refuse by row
        return (line.removeprefix(BOM) if start else line).decode("utf-8", "surrogateescape")


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
        yield from rest


def _line_at(file: BinaryIO, offset: int) -> int:
    """How many lines end before `offset`."""
    file.seek(0)
    lines = 0
    while offset > 0 and (read := file.read(min(1 << 20, offset))):
        lines += read.count(b"\n")
        offset -= len(read)
    return lines
