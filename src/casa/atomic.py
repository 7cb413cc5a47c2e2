"""Files that appear whole or not at all: written beside their destination, then renamed over it.

An exception or Ctrl-C while writing removes the unfinished file and leaves whatever was there before.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from casa.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh empty file beside `path`; renamed to `path` if the block ends well, removed if it does not.

    A link is followed, so it still points to the file afterwards. Permissions follow the umask, or the
    file that is replaced.

    Raises:
        UserError: the folder does not exist or cannot be written, or `path` is no regular file.
    """
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
    try:
        yield unfinished
        if target.exists():
            os.chmod(unfinished, target.stat().st_mode & 0o777)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


class _OnlyLooked(Exception):  # noqa: N818  it ends a look
    pass


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Raises UserError as `replacing` would, before the hours that go into what is written. None is passed over.

    Nothing is left behind, and nothing that is there is touched.
    """
    for path in paths:
        if path is not None:
            with suppress(_OnlyLooked), replacing(path):
                raise _OnlyLooked


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with "\\n" line ends, whole or not at all.

    Raises:
        UserError: see `replacing`; also when the disk is full.
    """
    with replacing(path) as unfinished:
        try:
            unfinished.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): free some space.") from error
