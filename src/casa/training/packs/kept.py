"""Image tokens of a frozen tower, kept: a picture that comes again is neither opened nor encoded.

Shapes: P patches and N image tokens of a picture, c channels of a patch, d_v width of the tower's output.

    first time    file -> pixels (P, c) -> tower -> tokens (N, d_v), kept
    afterwards                              kept -> tokens (N, d_v)
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from casa.training.packs.feature_folder import FeatureFolder
from casa.training.samples.sample import SizedPicture

Encode = Callable[[Tensor, Tensor], Tensor]
"""From pixel_values (P, c) and image_grid_thw (1, 3) to image tokens (N, d_v), in host memory."""


class KeptFeatures:
    """encode: the tower. most_bytes: of all tokens kept in memory; once full, further pictures are encoded each time,
    or read from what `folder` gives, where all of them are kept. It is called with the first picture.

    kept: bytes held now. found, made: how often a picture was at hand, and how often it was encoded.
    """

    def __init__(self, encode: Encode, most_bytes: int, folder: Callable[[], FeatureFolder] | None = None) -> None:
        self._encode, self._most, self._open = encode, most_bytes, folder
        self._folder: FeatureFolder | None = None
        self._tokens: dict[Any, dict[str, Tensor]] = {}
        self.kept = self.found = self.made = 0

    def get(self, sized: SizedPicture, pixels: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`image_features` (N, d_v) and `image_grid_thw` (1, 3) of a picture; pixels: opens it, if it must be."""
        try:
            key = _key(sized)
        except OSError:
            # whoever opens it says what is wrong with the file
            return self.encoded(pixels())
        if (held := self._tokens.get(key)) is not None:
            self.found += 1
            return held
        if self._folder is None and self._open is not None:
            self._folder = self._open()
        made = self._folder.get(key) if self._folder is not None else None
        if made is None:
            made = self.encoded(pixels())
            if self._folder is not None:
                self._folder.put(key, made)
        size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        if self.kept + size <= self._most:
            self._tokens[key] = made
            self.kept += size
        return made

    def encoded(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for pixels that nobody asks for again."""
        self.made += 1
        grid = pixels["image_grid_thw"]
        return {"image_features": self._encode(pixels["pixel_values"], grid), "image_grid_thw": grid}


def _key(sized: SizedPicture) -> Any:
    source = sized.picture.source
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).digest(), sized.most_tokens
    # a file that was written anew is another picture
    there = source.stat()
    return os.path.realpath(source), there.st_mtime_ns, there.st_size, sized.most_tokens
