"""Pictures and videos as rows name them: paths below the root, data: URIs, bytes, or what `datasets` makes of pictures.

A row is foreign text: its paths never lead out of the root unless the settings allow it, and nothing is downloaded.
"""

import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote_to_bytes

from PIL import Image

from casa.data.frames import video_frames
from casa.data.record import BadRecord, Origin, Picture, Record
from casa.data.settings import SourceSettings
from casa.errors import UserError
from casa.media import open_picture
from casa.media import pictures as media

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def open_pictures(record: Record) -> list[Image.Image]:
    """All pictures of a record, decoded, RGB and upright, in its order.

    Raises:
        BadRecord: One of them is damaged, cut off, too large, or gone since the row was read.
    """
    return [open_one(picture, number) for number, picture in enumerate(record.pictures(), start=1)]


def open_one(picture: Picture, number: int = 1) -> Image.Image:
    """One picture, decoded. number: which of its record it is, for the sentence. Raises BadRecord."""
    try:
        if isinstance(picture.source, bytes):
            return open_picture(io.BytesIO(picture.source))
        return open_picture(picture.source)
    except UserError as error:
        sentence = str(error)
        if isinstance(picture.source, bytes):
            sentence = sentence.replace("The picture", f"Picture {number}", 1)
        raise BadRecord("unreadable-picture", sentence) from error


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height in px, upright, from the file's header. Raises BadRecord if there is no readable header."""
    source = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
    try:
        return media.picture_size(source)
    except UserError as error:
        gone = not isinstance(picture.source, bytes) and not os.path.lexists(picture.source)
        raise BadRecord("missing-picture" if gone else "unreadable-picture", str(error)) from error


# (video, fps, start and end in seconds, longest side in px, frames at most, whether a longer one is thinned)
FramesOf = Callable[[Path, float, float, float | None, int, int, bool], list[Picture]]


@dataclass(frozen=True)
class RowContext:
    """What a row's reader needs besides the row: it finds the pictures and videos that the row names.

    Attributes:
        root: The folder where relative paths start.
        members: Files that travel with the row, by name (a WebDataset sample's), which come before files on disk.
        frames_of: Reads a video.
    """

    origin: Origin
    settings: SourceSettings
    root: Path
    members: Mapping[str, bytes] = field(default_factory=dict)
    frames_of: FramesOf = video_frames

    def frames(self, path: Path, start: float = 0.0, end: float | None = None, *, thin: bool) -> list[Picture]:
        """A video's frames as the settings say. thin: look less often at a long one, rather than refuse it."""
        chosen = self.settings
        return self.frames_of(path, chosen.fps, start, end, chosen.frame_side, chosen.max_frames, thin)

    def picture(self, value: object) -> Picture:
        """A picture from a path, a data: URI, bytes, or {"bytes": ..., "path": ...}. Raises BadRecord."""
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return self.picture(value["bytes"])
            named = value.get("path") or value.get("url")
            if named is None:
                raise BadRecord("missing-picture", "A picture has neither bytes nor a path: give one of them.")
            return self.picture(named)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return _of_bytes(bytes(value))
        if isinstance(value, str):
            if value[:5].lower() == "data:":
                try:
                    return _of_bytes(media.data_bytes(value))
                except UserError as error:
                    raise BadRecord("unreadable-picture", str(error)) from error
            if value in self.members:
                return _of_bytes(self.members[value])
            return Picture(self.path(value, "picture"))
        if value is None:
            raise BadRecord("missing-picture", "A picture is null: give its path, or leave the record out.")
        raise BadRecord("wrong-type", f"A picture is a {type(value).__name__}: give a path, a data: URI or bytes.")

    def path(self, value: object, kind: str) -> Path:
        """An existing file that the row names; kind: "picture" or "video". Raises BadRecord."""
        if not isinstance(value, str) or not value.strip():
            reason = "wrong-type" if value and not isinstance(value, str) else "missing-picture"
            raise BadRecord(reason, f"The {kind} is {_short(value)}: give the path of a file.")
        if value.lower().startswith("file://"):
            value = os.fsdecode(unquote_to_bytes(value[7:]))
        if _REMOTE.match(value):
            raise BadRecord(
                "missing-picture", f"The {kind} {_short(value)} is elsewhere: download it, and name the file."
            )
        if "\0" in value:
            raise BadRecord("wrong-type", f"The path of the {kind} holds a zero byte: mend it.")
        joined = os.path.join(self.root, value)
        try:
            inside = self.settings.outside or _is_below(joined, str(self.root))
            there = inside and os.path.isfile(joined)
        except (OSError, ValueError) as error:
            raise BadRecord(
                "missing-picture", f"The {kind} {_short(value)} cannot be reached: check its path."
            ) from error
        if not inside:
            raise BadRecord(
                "outside",
                f"The {kind} {_short(value)} lies outside of {self.root}: set root to a folder that holds it, "
                "or outside to true.",
            )
        if not there:
            raise BadRecord("missing-picture", f"There is no {kind} {joined}: check the path, or set root.")
        return Path(joined)


def _is_below(path: str, root: str) -> bool:
    """Whether a path lies in a folder once all links are followed, so that none in the data leads out of it."""
    here = os.getcwd()
    path, root = os.path.join(here, path), os.path.join(here, root)
    folder, name = os.path.split(path)
    plain = name not in ("", ".", "..") and not os.path.islink(path)
    real = os.path.join(_real_folder(folder), name) if plain else os.path.realpath(path)
    whole = _real_folder(root)
    return real == whole or real.startswith(whole.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    # following links takes longer than all else that is done with a row, and folders are few
    return os.path.realpath(path)


def _of_bytes(data: bytes) -> Picture:
    if not data:
        raise BadRecord("unreadable-picture", "A picture is empty: copy or download it again.")
    return Picture(data)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
