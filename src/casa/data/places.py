"""Which files a source's path names: one file, a folder of them, a glob, or what `datasets` has saved in a folder."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from casa.data.formats import COMPRESSIONS, READERS, holds_rows
from casa.data.formats.row import ending_of
from casa.errors import UserError

_KINDS = f"{', '.join(sorted(READERS))}; most of them also {', '.join(COMPRESSIONS)}"
# files that hold rows in ways that are not read: passed over in silence, they would be lost
_FOREIGN = frozenset({".feather", ".tfrecord", ".orc", ".avro", ".msgpack", ".pkl", ".pickle", ".mds", ".xlsx"})
_ARCHIVES = frozenset({".zip", ".7z", ".rar", ".lz4", ".lzma", ".br", ".z"})
# what `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside their tables
_SAVED, _SAVED_DICT = ("state.json", "dataset_info.json"), "dataset_dict.json"


def data_files(path: str, split: str = "train") -> list[Path]:
    """Files of rows, sorted. split: of a saved DatasetDict.

    Raises UserError where there are none, and for files among them that hold rows and cannot be read.
    """
    named = Path(path).expanduser()
    if named.is_file():
        if not holds_rows(named):
            raise UserError(f"{path} is none of the files that hold records ({_KINDS}): convert it to one of them.")
        return [named]
    if named.is_dir():
        found = list(_in_folder(named, split))
        if not found:
            raise UserError(f"{path} has no file of records ({_KINDS}): name a folder that has.")
        return sorted(found)
    if glob.has_magic(path):
        found = [Path(file) for file in glob.glob(str(named), recursive=True)]
        found = list(_readable(file for file in found if file.is_file()))
        if not found:
            raise UserError(f"No file of records ({_KINDS}) fits {path}: mend the pattern.")
        return sorted(found)
    hint = (
        f"; a data set of the hub is written hub:{path}"
        if path.count("/") == 1 and not path.startswith((".", "/", "~"))
        else ""
    )
    raise UserError(f"There is no {path}: check the path of the data{hint}.")


def _in_folder(folder: Path, split: str, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files of rows in a folder, searched to its bottom. above: the real folders that it lies in, against loops."""
    if (folder / _SAVED_DICT).is_file():
        splits = _listed(folder / _SAVED_DICT, "splits")
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}: set split to one of {', '.join(splits)}.")
        yield from _saved(folder / split)
        return
    if all((folder / name).is_file() for name in _SAVED):
        yield from _saved(folder)
        return
    here = os.path.realpath(folder)
    if here in above:
        return
    # reports of bad records may lie beside the data, and are none
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "bad-records"))]
    yield from _readable(entry for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir():
            yield from _in_folder(entry, split, above | {here})


def _readable(files: Iterable[Path]) -> Iterator[Path]:
    """Those that hold rows. Raises UserError for one that does, and that nothing here reads."""
    for file in files:
        ending, compression = ending_of(file)
        if holds_rows(file):
            yield file
        elif ending in _FOREIGN or (compression and ending in ("", *READERS)) or _archived(file):
            raise UserError(
                f"{file} looks like a file of records that is not read ({_KINDS}): convert or unpack it, or name the "
                "others with a pattern."
            )


def _archived(file: Path) -> bool:
    """Whether it is a file of rows in an archive of a kind that is not read: rows.jsonl.zip."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    return len(suffixes) == 2 and suffixes[0] in READERS and suffixes[1] in _ARCHIVES


def _saved(folder: Path) -> list[Path]:
    """The tables of a saved Dataset; others in its folder are what `datasets` keeps for itself."""
    found = [folder / entry["filename"] for entry in _listed(folder / _SAVED[0], "_data_files")]
    for file in found:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its {_SAVED[0]} names: save the data set again.")
    return found


def _listed(file: Path, key: str) -> list:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not as datasets writes it: save the data set again.") from error
    if not isinstance(found, list):
        raise UserError(f"{file} is not as datasets writes it: save the data set again.")
    return found
