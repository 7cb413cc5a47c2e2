"""Tables of Arrow: parquet, one row group at a time, and the .arrow files of `save_to_disk`.

A row group is a piece: readers can share a file without reading all of it. An .arrow file is mapped, not read, so that
passing over rows costs nothing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from casa.data.bad import BadRecord, said_by
from casa.data.formats.row import Cursor, Piece, Row
from casa.errors import UserError

# rows decoded at once: few, since a row may hold megabytes of pictures
_BATCH = 16


def import_parquet() -> ModuleType:
    """`pyarrow.parquet`. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Reading parquet needs pyarrow: install casa-vlm[train].") from error
    return pyarrow.parquet


def parquet_pieces(path: Path) -> list[Piece]:
    """One piece per row group; a file that cannot be read is one piece, whose only row says so."""
    parquet = import_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            counts = [file.metadata.row_group(part).num_rows for part in range(file.metadata.num_row_groups)]
    # pyarrow's errors for damaged files have no common class
    except Exception:
        return [Piece(path)]
    return [Piece(path, part, sum(counts[:part])) for part in range(len(counts))]


def read_parquet_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The rows of a row group from `cursor` on, as dicts; pictures are {"bytes": ..., "path": ...}."""
    parquet = import_parquet()
    number = 0
    try:
        with parquet.ParquetFile(piece.path) as file:
            for batch in file.iter_batches(_BATCH, row_groups=[piece.part], use_threads=False):
                size = batch.nbytes // max(1, batch.num_rows)
                for at in range(batch.num_rows):
                    number += 1
                    if number > cursor[0] and mine(number - 1):
                        value: dict[str, Any] = batch.slice(at, 1).to_pylist()[0]
                        yield Row(piece.first + number, value, size, (number, 0))
    except Exception as error:
        if isinstance(error, (MemoryError, UserError)):
            raise
        if mine(number):
            yield _broken_off("parquet", piece.first + number + 1, number + 1, error)


def read_arrow_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The rows of a stream of record batches, as `datasets` saves them, or of a file of them, from `cursor` on."""
    import_parquet()
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(piece.path)) as held:
            for batch in _batches(pyarrow.ipc, held):
                if number + batch.num_rows <= cursor[0]:
                    number += batch.num_rows
                    continue
                size = batch.nbytes // max(1, batch.num_rows)
                for at in range(batch.num_rows):
                    number += 1
                    if number > cursor[0] and mine(number - 1):
                        yield Row(number, batch.slice(at, 1).to_pylist()[0], size, (number, 0))
    except Exception as error:
        if isinstance(error, (MemoryError, UserError)):
            raise
        if mine(number):
            yield _broken_off("Arrow", number + 1, number + 1, error)


def _batches(ipc: Any, held: Any) -> Iterator[Any]:
    file = held.read(6) == b"ARROW1"
    held.seek(0)
    if file:
        reader = ipc.open_file(held)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from ipc.open_stream(held)


def _broken_off(kind: str, line: int, number: int, error: Exception) -> Row:
    bad = BadRecord(
        "unreadable-file", f"The file is no {kind} from here on, or damaged ({said_by(error)}): copy it again."
    )
    return Row(line, bad, 0, (number, 0), last=True)
