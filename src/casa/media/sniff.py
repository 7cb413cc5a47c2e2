"""What every reader of a media file asks first: is there a file with something in it, and is it text?"""

import os
from pathlib import Path

from casa.errors import UserError

HEAD_BYTES = 4096


def read_head(path: str | os.PathLike[str], kind: str) -> bytes:
    """The first bytes of the file at `path`; `kind` ("picture", "video") is how the sentences call it.

    Raises:
        UserError: nothing there, a directory, a pipe or device, an empty file, or no right to read it.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise UserError(f"There is no file {path}: check the name of the {kind}.")
        if file.is_dir():
            raise UserError(f"{path} is a directory: name one {kind} file inside it.")
        if not file.is_file():
            raise UserError(f"{path} is not a regular file: save the {kind} to a file first.")
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if not head:
        raise UserError(f"{path} is empty: copy or download the {kind} again.")
    return head


def looks_like_text(head: bytes) -> bool:
    """Whether the first bytes of a file are plain text: UTF-8 without any zero byte.

    The cut at `HEAD_BYTES` may fall inside one character, so an incomplete last one is forgiven.
    """
    if b"\0" in head or head.startswith((b"YUV4MPEG2", b"GIF8")):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) == HEAD_BYTES and error.start >= len(head) - 3
    return True
