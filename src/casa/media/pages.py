"""Files of many pictures that FFmpeg does not read and Pillow does, in the form of a decoder: animated WebP, and the
pages of a TIFF, each of which is shown for a second, as a single picture is.
"""

import os
import warnings
from typing import Self

from PIL import Image

from casa.errors import UserError
from casa.media.pictures import FORMATS, as_picture
from casa.media.source import Counts

PAGE = 1.0  # s
_REDUCED = 254  # the TIFF tag that says of a page that it shows another one in small


class Pages:
    """The pictures of such a file, as `Decoder` gives frames: `frames`, `seek`, `duration`, `rate`, `count`, `codec`.

    Raises UserError for a file that Pillow does not read.
    """

    aspect = 1.0

    def __init__(self, path: str | os.PathLike[str], counts: Counts | None = None) -> None:
        self.name, self.counts = str(path), counts if counts is not None else Counts()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._file = Image.open(path, formats=FORMATS)
                pages = getattr(self._file, "n_frames", 1)
            except Exception as error:
                raise UserError(f"{path} is damaged or cut off: copy or download it again.") from error
        self.codec = str(self._file.format).lower()
        self._lengths = _webp_lengths(path) if self.codec == "webp" else [PAGE] * pages
        self.count = len(self._lengths)
        self.duration = sum(self._lengths)
        self.rate = self.count / self.duration if self.duration else 1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def seek(self, time: float) -> None:
        """Nothing: a page may be drawn over the one before, so they are read from the first on."""

    def frames(self):
        """(time, PIL image, how long it is shown), damaged ones passed over."""
        time = 0.0
        for k, length in enumerate(self._lengths):
            try:
                self._file.seek(k)
                tags = getattr(self._file, "tag_v2", {})
                page = None if k and tags.get(_REDUCED, 0) & 1 else as_picture(self._file.copy(), self.name)
            except (UserError, EOFError, OSError, ValueError, SyntaxError):
                self.counts.skipped += 1
                page = None
            if page is not None:
                self.counts.decoded += 1
                yield time, page, length
                time += length


def _webp_lengths(path: str | os.PathLike[str]) -> list[float]:
    """Seconds for which each picture of an animated WebP is shown, as the heads of its chunks say."""
    lengths = []
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"ANMF":
                # browsers show for a tenth of a second what would be shown for none
                lengths.append(int.from_bytes(file.read(16)[12:15], "little") / 1000 or 0.1)
                size -= 16
            file.seek(size + size % 2, os.SEEK_CUR)
    return lengths
