"""A folder of files that are found again by a key, for what takes long to make: frames of videos, image tokens.

    FOLDER/<two digits>/<the key's other digits><ending>

Processes may share a folder: each file appears whole. Nothing is ever removed from it.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from casa.atomic import replacing
from casa.errors import UserError

_log = logging.getLogger(__name__)


class DiskCache:
    """what: is kept, and setting: names the folder, in the words of warnings and errors. written: files so far.

    Raises UserError if the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], ending: str, what: str, setting: str) -> None:
        self._folder, self._ending, self._what = Path(folder).expanduser(), ending, what
        self._writes = True
        self.written = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}): name another {setting}.") from error

    def path(self, key: Any) -> Path:
        """The file of a key, which says all of itself by its `repr`; whether it is there or not."""
        name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}{self._ending}"

    def put(self, key: Any, write: Callable[[Path], None]) -> None:
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
        except (OSError, UserError) as error:
            self._writes = False
            _log.warning("%s are no longer kept in %s: %s", self._what, self._folder, error)
        else:
            self.written += 1
