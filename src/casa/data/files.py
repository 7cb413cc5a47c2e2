"""The files that a source's path names, and what they hold once decompressed.

A path names one file, a folder of them, a glob, or what `datasets` has saved in a folder.
"""

import bz2
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from casa.errors import UserError

# endings that may be followed by one of `COMPRESSIONS`; tables of Arrow compress what they hold themselves
COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tar")
ENDINGS = (*COMPRESSIBLE, ".parquet", ".arrow")
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
# files that hold rows in ways that are not read: passed over in silence, they would be lost
_FOREIGN = frozenset({".feather", ".tfrecord", ".orc", ".avro", ".msgpack", ".pkl", ".pickle", ".mds", ".xlsx"})
_ARCHIVES = frozenset({".zip", ".7z", ".rar", ".lz4", ".lzma", ".br", ".z"})
# what `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside their tables
_SAVED, _SAVED_DICT = ("state.json", "dataset_info.json"), "dataset_dict.json"


def data_files(path: str, split: str = "train") -> list[Path]:
    """Files of rows, sorted. split: of a saved DatasetDict.

    Raises:
        UserError: There are none, or files among them hold rows in a format that is not read.
    """
    named = Path(path).expanduser()
    if named.is_file():
        if not holds_rows(named):
            raise UserError(f"{path} is none of the files that hold records ({KINDS}): convert it to one of them.")
        return [named]
    if named.is_dir():
        found = list(_in_folder(named, split))
        missing = f"{path} has no file of records ({KINDS}): name a folder that has some."
    elif glob.has_magic(path):
        found = list(_readable(map(Path, glob.glob(str(named), recursive=True))))
        missing = f"No file of records ({KINDS}) fits {path}: mend the pattern, or name a folder that has some."
    else:
        slashes = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        hint = f"; a data set of the hub is written hub:{path}" if slashes else ""
        raise UserError(f"There is no {path}: check the path of the data{hint}.")
    if not found:
        raise UserError(missing)
    return sorted(found)


def holds_rows(path: Path) -> bool:
    """Whether a file of such a name is read."""
    ending, compression = ending_of(path)
    return ending in (COMPRESSIBLE if compression else ENDINGS)


def ending_of(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of rows.jsonl.gz, (".jsonl", "") of rows.jsonl: what a file holds, and how it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _SHORT:
        suffixes = Path(f"x{_SHORT[suffixes[-1]]}").suffixes
    if suffixes and suffixes[-1] in _OPENERS:
        return (suffixes[0] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def open_file(path: Path) -> BinaryIO:
    """What a file holds, decompressed. Going back in a compressed one means to read it again from its beginning.

    Raises:
        UserError: It is compressed as Zstandard does, and nothing here can read that.
    """
    compression = ending_of(path)[1]
    return cast(BinaryIO, _OPENERS[compression](path)) if compression else path.open("rb")


def read_errors() -> tuple[type[Exception], ...]:
    """What is raised while a file is read that is damaged, cut off or no longer there."""
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *((zstd.ZstdError,) if (zstd := _zstandard()) else ()))


@cache
def _zstandard() -> Any:
    """The module of Python 3.14 that reads Zstandard, or the one that brings it to older ones; None without either."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return import_module(name)
    return None


def _open_zstandard(path: Path) -> object:
    if _zstandard() is None:
        raise UserError(f"Reading {path} needs backports.zstd: install casa-vlm[train], or decompress it.")
    return _zstandard().open(path, "rb")


_OPENERS: Mapping[str, Callable[[Path], object]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
COMPRESSIONS = tuple(_OPENERS)
KINDS = f"{', '.join(sorted(ENDINGS))}; most of them also {', '.join(COMPRESSIONS)}"


def _in_folder(folder: Path, split: str, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files of rows in a folder, searched to its bottom. above: the real folders that it lies in, against loops."""
    if (folder / _SAVED_DICT).is_file():
        splits = _listed(folder / _SAVED_DICT, "splits")
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}: set split to one of {', '.join(splits)}.")
        folder = folder / split
    if all((folder / name).is_file() for name in _SAVED):
        # other files beside the tables are what `datasets` keeps for itself
        for entry in _listed(folder / _SAVED[0], "_data_files"):
            file = folder / entry["filename"]
            if not file.is_file():
                raise UserError(f"{folder} lacks {file.name}, which its {_SAVED[0]} names: save the data set again.")
            yield file
        return
    here = os.path.realpath(folder)
    if here in above:
        return
    # reports of bad records may lie beside the data, and are none
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "bad-records"))]
    yield from _readable(entries)
    for entry in entries:
        if entry.is_dir():
            yield from _in_folder(entry, split, above | {here})


def _readable(paths: Iterable[Path]) -> Iterator[Path]:
    """Files that hold rows. Raises UserError for one that does, and that nothing here reads."""
    for file in (path for path in paths if path.is_file()):
        ending, compression = ending_of(file)
        suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
        archived = len(suffixes) == 2 and suffixes[0] in ENDINGS and suffixes[1] in _ARCHIVES
        if holds_rows(file):
            yield file
        elif ending in _FOREIGN or (compression and ending in ("", *ENDINGS)) or archived:
            raise UserError(
                f"{file} looks like a file of records that is not read ({KINDS}): convert or unpack it, or name the "
                "others with a pattern."
            )


def _listed(file: Path, key: str) -> list[Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
        if isinstance(found, list):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} is not as datasets writes it: save the data set again.")
