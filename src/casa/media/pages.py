"""Files of many pictures that FFmpeg does not read and Pillow does, in the form of a decoder: animated WebP, and the
pages of a TIFF, each of which is shown for a second, as a single picture is.
"""

import os
import warnings
from contextlib import nullcontext
from typing import BinaryIO, Self

from PIL import Image

from casa.errors import UserError
from casa.media.pictures import FORMATS, as_picture
from casa.media.source import Counts

PAGE = 1.0  # s
_REDUCED = 254  # the TIFF tag that says of a page that it shows another one in small


class Pages:
    """The pictures of such a file, as `Decoder` gives frames: `frames`, `seek`, `duration`, `rate`, `count`, `codec`.

    path: or an open file; then `name` is how sentences call it. Raises UserError for a file that Pillow does not read.
    """

    aspect = 1.0

    def __init__(
        self, path: str | os.PathLike[str] | BinaryIO, counts: Counts | None = None, name: str | None = None
    ) -> None:
        self.name, self.counts = str(path) if name is None else name, counts if counts is not None else Counts()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._file = Image.open(path, formats=FORMATS)
                pages = getattr(self._file, "n_frames", 1)
            except Exception as error:
                raise UserError(f"{self.name} is damaged or cut off: copy or download it again.") from error
        self.codec = str(self._file.format).lower()
        self._lengths = self._webp_lengths(path) if self.codec == "webp" else [PAGE] * pages
        self.count = len(self._lengths)
        self.duration = sum(self._lengths)
        self.rate = self.count / self.duration if self.duration else 1.0

    @property
    def summary(self) -> str:
        return f"{self._file.width} x {self._file.height}, {self.codec}"

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

    @staticmethod
    def _webp_lengths(path: str | os.PathLike[str] | BinaryIO) -> list[float]:
        """Seconds for which each picture of an animated WebP is shown, as the heads of its chunks say."""
        lengths = []
        with open(path, "rb") if isinstance(path, (str, os.PathLike)) else nullcontext(path) as file:
            back = file.tell()
            file.seek(12)
            while len(head := file.read(8)) == 8:
                size = int.from_bytes(head[4:], "little")
                if head[:4] == b"ANMF":
                    # browsers show for a tenth of a second what would be shown for none
                    lengths.append(int.from_bytes(file.read(16)[12:15], "little") / 1000 or 0.1)
                    size -= 16
                file.seek(size + size % 2, os.SEEK_CUR)
            file.seek(back)
        return lengths
