"""`open_source`: whatever the user wrote, as a source of frames."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.backoff import Backoff
from casa.media.device import is_device, open_device
from casa.media.network import is_address, open_address
from casa.media.pictures_source import FolderSource, PictureSource
from casa.media.pipe import PipeSource, is_pipe
from casa.media.source import Source
from casa.media.video import FrameReader


def open_source(
    spec: str | os.PathLike[str] | Iterable[Any],
    fps: float = 2.0,
    *,
    start: float = 0.0,
    end: float | None = None,
    after: float | None = None,
    live: bool | None = None,
    timeout: float = 10.0,
    options: dict[str, str] | None = None,
    backoff: Backoff | None = None,
) -> Source:
    """Frames with their times, looked at `fps` times a second.

    spec: a video file (or a picture: one frame); a directory of pictures; "camera:0", "screen"; an address
    (rtsp://, http://, https:// ...); "-" for what is piped in; a binary file object; any Python iterable of pictures
    or `Frame`s.
    start, end: seconds, for files and directories. after: the time of the last frame that an earlier run took; files
    and directories go on with the one that would have been next, all else begins where it begins. live: for addresses,
    pipes and iterables, whether frames come at their own pace (None finds out where it can). timeout, options,
    backoff: see `open_address`.

    Raises:
        UserError: nothing that can be read, or a setting that this kind of source does not have.
        TypeError: a single picture, or something that gives none.
    """
    if not isinstance(spec, (str, os.PathLike)):
        _no_part(start, end, "a Python object")
        if isinstance(spec, Source):
            raise TypeError("this is a source already: use it as it is")
        if isinstance(spec, (np.ndarray, Image.Image, bytes)) or not (hasattr(spec, "read") or _iterable(spec)):
            raise TypeError(f"a {type(spec).__name__} is no source of frames: give an iterable of pictures, or a path")
        if hasattr(spec, "read"):
            return PipeSource(spec, fps, live=bool(live))  # pyright: ignore[reportArgumentType]
        return PictureSource(spec, fps, live=bool(live))
    text = os.fspath(spec)
    if not text:
        raise UserError("The name of the video is empty: name a file, a folder, a camera or an address.")
    if text == "-" or is_pipe(text):
        _no_part(start, end, "a pipe")
        return PipeSource(text, fps, live=bool(live))
    if is_device(text):
        _no_part(start, end, "a camera or screen")
        return open_device(text, fps, options=options, backoff=backoff)
    if is_address(text) and not text.lower().startswith("file://"):
        _no_part(start, end, "an address")
        return open_address(text, fps, live=live, timeout=timeout, options=options, backoff=backoff)
    path = text[len("file://") :] if text.lower().startswith("file://") else text
    if os.path.isdir(path):
        return FolderSource(path, fps, start, end, after)
    return FrameReader(path, fps, start, end, after)


def _iterable(spec: object) -> bool:
    return hasattr(spec, "__iter__") or hasattr(spec, "__getitem__")


def _no_part(start: float, end: float | None, kind: str) -> None:
    if start != 0 or end is not None:
        raise UserError(f"start and end are for files and folders: leave them out for {kind}.")
