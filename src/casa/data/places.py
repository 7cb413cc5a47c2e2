"""Which files a source's path names: one file, a folder of them, or a glob."""

import glob
from pathlib import Path

from casa.data.formats import READERS
from casa.errors import UserError

_KINDS = ", ".join(sorted(READERS))


def data_files(path: str) -> list[Path]:
    """Files of rows, sorted. Raises UserError where there are none."""
    named = Path(path).expanduser()
    if named.is_file():
        if named.suffix.lower() not in READERS:
            raise UserError(f"{path} is none of the files that hold records ({_KINDS}): convert it to one of them.")
        return [named]
    if named.is_dir():
        found = [file for file in named.rglob("*") if _holds_rows(file, named)]
        if not found:
            raise UserError(f"{path} has no file of records ({_KINDS}): name a folder that has.")
        return sorted(found)
    if glob.has_magic(path):
        found = [Path(file) for file in glob.glob(str(named), recursive=True)]
        found = [file for file in found if file.is_file() and file.suffix.lower() in READERS]
        if not found:
            raise UserError(f"No file of records ({_KINDS}) fits {path}: mend the pattern.")
        return sorted(found)
    hint = (
        f"; a data set of the hub is written hub:{path}"
        if path.count("/") == 1 and not path.startswith((".", "/", "~"))
        else ""
    )
    raise UserError(f"There is no {path}: check the path of the data{hint}.")


def _holds_rows(file: Path, folder: Path) -> bool:
    # reports of bad records may lie beside the data, and are none
    hidden = any(part.startswith((".", "bad-records")) for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in READERS and file.is_file()
