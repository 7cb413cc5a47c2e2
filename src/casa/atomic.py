"""Files that appear whole or not at all: written beside their destination, then renamed over it.

An exception or Ctrl-C while writing removes the unfinished file and leaves whatever was there before.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from casa.errors import UserError

STALE_SECONDS = 3600  # an unfinished file as old as that has no writer any more

_log = logging.getLogger(__name__)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh empty file beside `path`; renamed to `path` if the block ends well, removed if it does not.

    A link is followed, so it still points to the file afterwards. Permissions follow the umask, or the
    file that is replaced.

    Raises:
        UserError: The folder does not exist or cannot be written, or `path` is no regular file.
    """
    target, unfinished = _begin(path)
    try:
        yield unfinished
        if target.exists():
            os.chmod(unfinished, target.stat().st_mode & 0o777)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _begin(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where `path` leads, and a fresh empty file beside that."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"{path} is a directory: name a file to write.")
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is not a regular file: name another file to write.")
    if not target.parent.is_dir():
        raise UserError(f"The folder of {path} does not exist: create it, or write elsewhere.")
    # a short name, since the target's own may already be as long as the file system allows
    unfinished = target.parent / f".casa-{secrets.token_hex(8)}.part"
    try:
        # O_EXCL: never write into a file, or through a link, that somebody else put there
        descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): write to another folder.") from error
    os.close(descriptor)
    return target, unfinished


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Raises UserError as `replacing` would, before the hours that go into what is written. None is passed over.

    Nothing is left behind, and nothing that is there is touched.
    """
    for path in paths:
        if path is not None:
            _begin(path)[1].unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with "\\n" line ends, whole or not at all.

    Raises:
        UserError: See `replacing`; also when the disk is full.
    """
    with replacing(path) as unfinished:
        try:
            unfinished.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): free some space.") from error


class DiskCache:
    """A folder of files that are found again by a key, for what takes long to make. Processes may share it.

        FOLDER/<two digits>/<the key's other digits><ending>

    Attributes:
        what, setting: What is kept, and what names the folder, in the words of warnings and errors.
        max_bytes: Of all files, the longest unused leaving first; None sets no bound.
        written: Files so far.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], ending: str, what: str, setting: str, max_bytes: int | None = None
    ) -> None:
        self._folder, self._ending, self._what = Path(folder).expanduser(), ending, what
        self._max = math.inf if max_bytes is None else max_bytes
        self._room = 0.0  # bytes that may be written before all files are counted again
        self._writes = True
        self.written = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}): name another {setting}.") from error

    def path(self, key: object) -> Path:
        """The file of a key, which says all of itself by its `repr`; whether it is there or not."""
        name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}{self._ending}"

    def put(self, key: object, write: Callable[[Path], None]) -> None:
        """Has `write` fill the key's file. A folder that takes no more, its disk being full, is only read from then on.

        What `write` raises apart from OSError and UserError is not caught.
        """
        if not self._writes:
            return
        path = self.path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as unfinished:
                write(unfinished)
                size = unfinished.stat().st_size
            self._make_room(size)
        except (OSError, UserError) as error:
            self._writes = False
            _log.warning("%s are no longer kept in %s: %s", self._what, self._folder, error)
        else:
            self.written += 1

    def used(self, path: Path) -> None:
        """Notes that a file was read, by whose time others are to leave before it."""
        with suppress(OSError):
            os.utime(path)

    def _make_room(self, written: int) -> None:
        """Removes the files that were not used for longest, once so many more bytes are too much."""
        self._room -= written
        if self._max == math.inf or self._room >= 0:
            return
        found, now = [], time.time()
        # these and no others: whoever names a folder may have files of his own in it
        for path in self._folder.glob(f"[0-9a-f][0-9a-f]/*{self._ending}"):
            with suppress(OSError):  # another process removes, too
                about = path.stat()
                found.append((about.st_mtime, path, about.st_size))
        for path in self._folder.glob("[0-9a-f][0-9a-f]/.casa-*.part"):  # of writers that were killed
            with suppress(OSError):
                if path.stat().st_mtime < now - STALE_SECONDS:
                    path.unlink()
        total = sum(size for _, _, size in found)
        left = 0.9 * self._max if total > self._max else self._max
        for _, path, size in sorted(found):
            if total <= left:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = (self._max - total) / 2  # another process writes, too


class Journal:
    """A file that grows by lines of JSON, for long work that may be killed between any two of them.

    The first line says of what work it is. A last line that its writer did not finish is taken off when the work goes
    on. To be used in a `with`.

    Args:
        path: The file.
        work: What the work is; JSON-ready.
        resume: Go on with the file that is there; otherwise a new one is begun.

    Attributes:
        entries: All that were read and added, in order.

    Raises:
        UserError: The file is of other work, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], work: dict[str, Any], resume: bool = False) -> None:
        self.entries: list[dict[str, Any]] = []
        whole = b""
        if resume and Path(path).exists():
            whole = Path(path).read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            try:
                first, *self.entries = [json.loads(line) for line in whole.splitlines()] or [work]
            except ValueError as error:
                raise UserError(f"{path} is no journal of casa's: remove it, or begin anew without resume.") from error
            if other := [name for name in work if not isinstance(first, dict) or first.get(name) != work[name]]:
                raise UserError(
                    f"{path} is of work with another {', '.join(other)}; give what that had, or leave out resume.",
                    field=(*other, "resume"),
                )
        check_writable(path)
        self._file = Path(path).open("r+b" if whole else "wb")  # noqa: SIM115  (closed by `__exit__`)
        self._file.seek(len(whole))
        self._file.truncate()
        if not whole:
            self._write(work)

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a line, which is on disk afterwards."""
        self._write(entry)
        self.entries.append(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
