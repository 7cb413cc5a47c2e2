"""Files of rows, each read from any of its rows on: JSON lines, JSON lists, CSV, parquet, Arrow and WebDataset tars.

A cursor is (rows before the next one, counted in its part of the file; its byte, where the format has use for that).
A reader gives the rows of one part from a cursor on, passing over those that `mine` refuses as cheaply as it can. It
raises nothing about the file's content: what cannot be read is a row whose value is a BadRecord.
"""

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TextIO

from casa.data.files import ending_of, open_file, read_errors
from casa.data.record import BadRecord, Origin, first_line
from casa.errors import UserError

Cursor = tuple[int, int]
START: Cursor = (0, 0)
# No row may hold more bytes: a file without line ends is not read into memory whole.
MAX_ROW_BYTES = 256 * 1024 * 1024
_MEBIBYTES = MAX_ROW_BYTES // 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row as a file holds it, before its shape is known.

    Attributes:
        value: The parsed row, or a BadRecord.
        after: The cursor of the next row.
        size: Bytes, about.
        folder: Where its relative paths start.
        members: Files that came with it, by name.
        last: Nothing of the part can be read after it.
    """

    origin: Origin
    value: object
    after: Cursor
    size: int = 0
    folder: Path = Path()
    members: Mapping[str, bytes] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class FilePart:
    """A file, or a part of one that can be read without the rest. part: which; first: rows of the file before it."""

    path: Path
    part: int = 0
    first: int = 0

    def row(self, line: int, value: object, after: Cursor, size: int = 0, *, entry: str = "", **rest: Any) -> Row:
        """A row of this part. rest: other fields of `Row`."""
        return Row(Origin(str(self.path), line, entry), value, after, size, self.path.parent, **rest)


# whether a row is wanted, by its number in the part, from 0
Mine = Callable[[int], bool]
Reader = Callable[[FilePart, Cursor, Mine], Iterator[Row]]


def read_jsonl(part: FilePart, cursor: Cursor, mine: Mine) -> Iterator[Row]:
    """JSON lines. A bad line is one bad row; blank lines count as lines, and are no rows."""
    number, offset = cursor
    with open_file(part.path) as file:
        file.seek(offset)
        while line := file.readline(MAX_ROW_BYTES):
            number, offset, piece = number + 1, offset + len(line), line
            while len(piece) == MAX_ROW_BYTES and not piece.endswith(b"\n"):
                piece = file.readline(MAX_ROW_BYTES)
                offset += len(piece)
            if not mine(number - 1):
                continue
            if piece is not line:
                bad = BadRecord("too-long", f"The line has more than {_MEBIBYTES} MiB: split the file at its rows.")
                yield part.row(number, bad, (number, offset))
                continue
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield part.row(number, _parsed(line), (number, offset), len(line))


def _parsed(line: bytes) -> object:
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


_CHUNK = 1 << 20  # characters
_INK = re.compile(r"[^ \t\r\n]")


def read_json(part: FilePart, cursor: Cursor, mine: Mine) -> Iterator[Row]:
    """A JSON list of rows, read one at a time, so that a file of gigabytes is never in memory whole; or JSON lines.

    A row's line is the one where it begins, and its number in the list its entry: a whole list may stand on one line.
    After a row that is no JSON nobody knows where the next begins: the rest of the file is one bad row.
    """
    with open_file(part.path) as file:
        first = file.readline(_CHUNK).removeprefix(_BOM)
    if first.lstrip()[:1] != b"[" and first.strip() and not isinstance(_parsed(first), BadRecord):
        yield from read_jsonl(part, cursor, mine)
        return
    with _open_text(part.path) as file:
        for number, (line, value, size) in enumerate(_json_values(_JsonText(file)), start=1):
            if number > cursor[0] and mine(number - 1):
                last = isinstance(value, BadRecord)
                yield part.row(line, value, (number, 0), size, entry=f"row {number}", last=last)


def _open_text(path: Path) -> TextIO:
    # bytes that are no UTF-8 become halves of characters, which the shapes refuse by row
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


class _JsonText:
    """A text of which only the part being decoded is kept. at, line: of the next character. whole: all is read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.held, self.at, self.line, self.whole = "", 0, 1, False

    def more(self) -> bool:
        """Reads on, as much again as is held; False at the end of the file."""
        kept = self.held[self.at :]
        read = self._file.read(max(_CHUNK, len(kept)))
        self.held, self.at, self.whole = kept + read, 0, not read
        return not self.whole

    def skip(self, end: int) -> None:
        self.line += self.held.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is no blank, or "" at the end."""
        while (found := _INK.search(self.held, self.at)) is None:
            self.skip(len(self.held))
            if not self.more():
                return ""
        self.skip(found.start())
        return found.group()


def _json_values(text: _JsonText) -> Iterator[tuple[int, object, int]]:
    """(line, value or BadRecord, characters) of every entry of a list, or of values one after another."""
    decode = json.JSONDecoder().raw_decode
    listed = text.peek() == "["
    text.skip(text.at + listed)
    while (mark := text.peek()) and mark != "]":
        # what was read is dropped now and then, not at every row
        if text.at > _CHUNK:
            text.more()
        while True:
            try:
                value, end = decode(text.held, text.at)
            except (ValueError, RecursionError):
                if len(text.held) < MAX_ROW_BYTES and text.more():
                    continue
                yield text.line, BadRecord("not-json", "From here on the file is no JSON, or cut off: mend it."), 0
                return
            # a value that touches the end of what is held may go on behind it
            if end < len(text.held) or text.whole:
                break
            text.more()
        yield text.line, value, end - text.at
        text.skip(end)
        if listed and text.peek() not in (",", "]"):
            bad = BadRecord("not-json", "The list of rows does not go on with a comma or end with ]: mend it.")
            yield text.line, bad, 0
            return
        text.skip(text.at + (listed and text.peek() == ","))
    if listed and mark != "]":
        yield text.line, BadRecord("not-json", "The file ends within its list of rows: copy it again."), 0


def read_csv(part: FilePart, cursor: Cursor, mine: Mine) -> Iterator[Row]:
    """A table with a header: commas, semicolons or tabs, whichever the header has most of. Rows are dicts of text.

    Cells may hold line ends in quotes; a row's line is the one where it ends.
    """
    with _open_text(part.path) as text:
        first = text.readline(MAX_ROW_BYTES)
        lines = chain([first], iter(lambda: text.readline(MAX_ROW_BYTES), ""))
        table = csv.reader(lines, delimiter=max(",;\t", key=first.count))
        header, number = _csv_cells(table), 0
        while (cells := _csv_cells(table)) is not None:
            number += cells != []
            if cells == [] or number <= cursor[0] or not mine(number - 1):
                continue
            value: object = cells if isinstance(header, list) else header
            if isinstance(header, list) and isinstance(cells, list):
                counts = f"{len(cells)} cells, and the header {len(header)}"
                wrong = BadRecord("wrong-type", f"The row has {counts}: put text with commas in quotes.")
                value = dict(zip(header, cells, strict=True)) if len(cells) == len(header) else wrong
            size = sum(map(len, cells)) if isinstance(cells, list) else 0
            yield part.row(table.line_num, value, (number, 0), size)


def _csv_cells(table: Iterator[list[str]]) -> list[str] | BadRecord | None:
    try:
        return next(table, None)
    except csv.Error as error:
        return BadRecord("too-long", f"The row cannot be read ({error}): look for a quote that is not closed.")


def import_parquet() -> ModuleType:
    """`pyarrow.parquet`. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Reading parquet needs pyarrow: install casa-vlm[train].") from error
    return pyarrow.parquet


def read_table(part: FilePart, cursor: Cursor, mine: Mine) -> Iterator[Row]:
    """A row group of parquet, or an Arrow file, as dicts; pictures are {"bytes": ..., "path": ...}."""
    number = 0
    try:
        for batch in _batches(part):
            if number + batch.num_rows <= cursor[0]:
                number += batch.num_rows
                continue
            size = batch.nbytes // max(1, batch.num_rows)
            for at in range(batch.num_rows):
                number += 1
                if number > cursor[0] and mine(number - 1):
                    yield part.row(part.first + number, batch.slice(at, 1).to_pylist()[0], (number, 0), size)
    # pyarrow's errors for damaged files have no common class
    except Exception as error:
        if isinstance(error, (MemoryError, UserError)):
            raise
        if mine(number):
            kind = part.path.suffix.lower().removeprefix(".")
            why = f"The file is no {kind} from here on, or damaged ({first_line(error)}): copy it again."
            yield part.row(part.first + number + 1, BadRecord("unreadable-file", why), (number + 1, 0), last=True)


def _batches(part: FilePart) -> Iterator[Any]:
    """Record batches of the part, few rows at a time where they are decoded. An Arrow file is mapped, not read."""
    parquet = import_parquet()
    import pyarrow

    if part.path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(part.path) as file:
            # a row may hold megabytes of pictures
            yield from file.iter_batches(16, row_groups=[part.part], use_threads=False)
        return
    with pyarrow.memory_map(str(part.path)) as held:
        seekable = held.read(6) == b"ARROW1"
        held.seek(0)
        if seekable:
            reader = pyarrow.ipc.open_file(held)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            # as `datasets` saves them
            yield from pyarrow.ipc.open_stream(held)


_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
_CAPTIONS = ("txt", "caption")


def read_tar(part: FilePart, cursor: Cursor, mine: Mine) -> Iterator[Row]:
    """WebDataset: members in a row that share a name up to its first dot are one sample; nothing is unpacked.

        0001.jpg 0001.json 0002.jpg 0002.txt ...

    A .json member is the row, of any shape; pictures that it does not name are its `image` (or `images`). A .txt member
    is the caption. A sample's line is its number, and its key its entry. Members are read as they come, so that a
    compressed file is never gone back in.
    """
    number, end = cursor
    damage: list[str] = []
    with open_file(part.path) as file:
        file.seek(end)
        for key, entries in groupby(_tar_members(file, damage), _tar_key):
            members: dict[str, bytes] = {}
            size, fault, cut = 0, None, False
            for member in entries:
                size += member.size
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if size > MAX_ROW_BYTES:
                    members.clear()
                    fault = BadRecord("too-long", f"The sample has more than {_MEBIBYTES} MiB: leave it out.")
                elif mine(number):
                    file.seek(member.offset_data)
                    members[member.name] = file.read(member.size)
                    if cut := len(members[member.name]) < member.size:
                        fault = BadRecord("unreadable-file", "The tar ends within this sample: copy it again.")
                        break
            number += 1
            if mine(number - 1):
                value = fault or _tar_row(members)
                yield part.row(number, value, (number, end), size, entry=key, members=members, last=cut)
            if cut:
                return
        if damage and mine(number):
            fault = BadRecord("unreadable-file", f"The file is no tar from here on ({damage[0]}): copy it again.")
            yield part.row(number + 1, fault, (number + 1, end), last=True)


def _tar_members(file: BinaryIO, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """The files of a tar; where it is damaged or cut off it ends, and `damage` says why."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile remembers every member it met
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if member.isfile():
                    yield member
            file.seek(tar.offset)
            # tarfile takes the end of the file for the end of the tar, which has a mark of its own
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                damage.append("it has no end")
    except (tarfile.TarError, *read_errors()) as error:
        damage.append(str(error) or "cut off")


def _tar_key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _tar_row(members: Mapping[str, bytes]) -> dict[str, Any] | BadRecord:
    """One row from the members of a sample."""
    row: dict[str, Any] = {}
    pictures, captions = [], []
    for name in sorted(members):
        ending = name.rpartition(".")[2].lower()
        if ending == "json":
            value = _parsed(members[name])
            if isinstance(value, BadRecord):
                return BadRecord("not-json", f"{name} is no JSON: mend or remove it.")
            row |= value if isinstance(value, dict) else {"messages": value}
        elif ending in _PICTURES:
            pictures.append(name)
        elif ending in _CAPTIONS:
            captions.append(members[name].decode("utf-8", "surrogateescape"))
    if captions and not row.keys() & {"messages", "conversations", "texts", "caption"}:
        row["caption"] = captions[0].strip()
    if pictures and not any(row.get(key) for key in ("image", "images", "video")):
        row |= {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return row


READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_table,
    ".arrow": read_table,
    ".tar": read_tar,
}


def file_parts(path: Path) -> list[FilePart]:
    """The parts of a file that can be read one without the other: row groups of parquet, else the file itself.

    Parquet that cannot be opened is one part, whose only row says so.
    """
    if path.suffix.lower() != ".parquet":
        return [FilePart(path)]
    parquet = import_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            counts = [file.metadata.row_group(part).num_rows for part in range(file.metadata.num_row_groups)]
    # pyarrow's errors for damaged files have no common class
    except Exception:
        return [FilePart(path)]
    return [FilePart(path, part, sum(counts[:part])) for part in range(len(counts))]


def read_rows(part: FilePart, cursor: Cursor, mine: Mine) -> Iterator[Row]:
    """The rows of a part from a cursor on; a file that cannot be read to its end closes with a bad row."""
    line, after = cursor[0], cursor
    try:
        for row in READERS[ending_of(part.path)[0]](part, cursor, mine):
            line, after = row.origin.line, row.after
            yield row
    except read_errors() as error:
        why = getattr(error, "strerror", None) or first_line(error)
        bad = BadRecord("unreadable-file", f"The file cannot be read from here on ({why}): copy it again.")
        # each of its readers says so: where the others stand, none of them knows
        yield part.row(line + 1, bad, after, last=True)
