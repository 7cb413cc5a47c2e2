"""Files of rows: JSON lines, JSON lists, CSV, parquet and WebDataset tars, each read from any of its rows on."""

from collections.abc import Mapping
from pathlib import Path

from casa.data.formats.csv_table import read_csv_rows
from casa.data.formats.json_array import read_json_rows
from casa.data.formats.jsonl import read_jsonl_rows
from casa.data.formats.parquet import parquet_pieces, read_parquet_rows
from casa.data.formats.row import Piece, Reader
from casa.data.formats.tar import read_tar_rows

READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl_rows,
    ".ndjson": read_jsonl_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".tsv": read_csv_rows,
    ".parquet": read_parquet_rows,
    ".tar": read_tar_rows,
}


def pieces_of(path: Path) -> list[Piece]:
    """The parts of a file that can be read one without the other."""
    return parquet_pieces(path) if path.suffix.lower() == ".parquet" else [Piece(path)]


def reader_of(path: Path) -> Reader:
    """What reads a file of this ending."""
    return READERS[path.suffix.lower()]
