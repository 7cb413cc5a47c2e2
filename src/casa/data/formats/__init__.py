"""Files of rows: JSON lines, JSON lists, CSV, parquet, Arrow and WebDataset tars, each read from any of its rows on.

Those in `COMPRESSED` may be compressed: rows.jsonl.gz.
"""

from collections.abc import Mapping
from pathlib import Path

from casa.data.formats.csv_table import read_csv_rows
from casa.data.formats.json_array import read_json_rows
from casa.data.formats.jsonl import read_jsonl_rows
from casa.data.formats.parquet import parquet_pieces, read_arrow_rows, read_parquet_rows
from casa.data.formats.row import COMPRESSIONS, Piece, Reader, ending_of
from casa.data.formats.tar import read_tar_rows

READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl_rows,
    ".ndjson": read_jsonl_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".tsv": read_csv_rows,
    ".parquet": read_parquet_rows,
    ".arrow": read_arrow_rows,
    ".tar": read_tar_rows,
}


# endings that may be followed by one of `COMPRESSIONS`; tables of Arrow compress what they hold themselves
COMPRESSED = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tar"})


def holds_rows(path: Path) -> bool:
    """Whether a file of such a name is read."""
    ending, compression = ending_of(path)
    return ending in (COMPRESSED if compression else READERS)


def pieces_of(path: Path) -> list[Piece]:
    """The parts of a file that can be read one without the other."""
    return parquet_pieces(path) if path.suffix.lower() == ".parquet" else [Piece(path)]


def reader_of(path: Path) -> Reader:
    """What reads a file of this ending."""
    return READERS[ending_of(path)[0]]


__all__ = ["COMPRESSED", "COMPRESSIONS", "READERS", "holds_rows", "pieces_of", "reader_of"]
