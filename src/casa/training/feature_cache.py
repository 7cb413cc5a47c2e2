"""Image tokens of a frozen image encoder, kept: a picture that comes again is neither opened nor encoded.

Shapes: P patches and N image tokens of a picture, c channels of a patch, d_v width of the encoder's output.

    first time    file -> pixels (P, c) -> encoder -> tokens (N, d_v), kept
    afterwards                              kept   -> tokens (N, d_v)

A folder keeps them for a run that goes on, and for a twin beside it:

    FOLDER/<encoder>/<key>.safetensors     image_features (N, d_v), image_grid_thw (1, 3)

<encoder> stands for the encoder (its class, config and weights), the image processor and the precision; <key> for the
picture's bytes (or its file's path, time and size) and the most tokens that it may have.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from casa.disk_cache import DiskCache
from casa.training.samples import SizedPicture

Encode = Callable[[Tensor, Tensor], Tensor]
"""From pixel_values (P, c) and image_grid_thw (1, 3) to image tokens (N, d_v), in host memory."""

_NAMES = {"image_features", "image_grid_thw"}


class FeatureCache:
    """Image tokens by picture.

    Args:
        encode: the encoder.
        max_bytes: of all tokens kept in memory; once full, further pictures are encoded each time, or read from the
            folder, where all of them are kept.
        open_folder: gives the folder; it is called with the first picture.

    Attributes:
        held: bytes in memory now. hits, encodes: how often a picture was there, and how often it was encoded.
    """

    def __init__(
        self, encode: Encode, max_bytes: int, open_folder: "Callable[[], FeatureFolder] | None" = None
    ) -> None:
        self._encode, self._max, self._open_folder = encode, max_bytes, open_folder
        self.folder: FeatureFolder | None = None
        self._tokens: dict[Any, dict[str, Tensor]] = {}
        self.held = self.hits = self.encodes = 0

    def get(self, sized: SizedPicture, pixels: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`image_features` (N, d_v) and `image_grid_thw` (1, 3) of a picture; pixels: opens it, if it must be."""
        try:
            key = _key(sized)
        except OSError:
            # whoever opens it says what is wrong with the file
            return self.encoded(pixels())
        if (held := self._tokens.get(key)) is not None:
            self.hits += 1
            return held
        if self.folder is None and self._open_folder is not None:
            self.folder = self._open_folder()
        made = self.folder.get(key) if self.folder is not None else None
        if made is None:
            made = self.encoded(pixels())
            if self.folder is not None:
                self.folder.put(key, made)
        size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        if self.held + size <= self._max:
            self._tokens[key] = made
            self.held += size
        return made

    def encoded(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for pixels that nobody asks for again."""
        self.encodes += 1
        grid = pixels["image_grid_thw"]
        return {"image_features": self._encode(pixels["pixel_values"], grid), "image_grid_thw": grid}


def _key(sized: SizedPicture) -> Any:
    source = sized.picture.source
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).digest(), sized.max_tokens
    # a file that was written anew is another picture
    there = source.stat()
    return os.path.realpath(source), there.st_mtime_ns, there.st_size, sized.max_tokens


class FeatureFolder:
    """Image tokens on disk.

    Args:
        encoder: what the tokens are made with, as `encoder_digest` gives it.

    Attributes:
        hits: pictures that were there so far.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        self._files = DiskCache(Path(folder) / encoder, ".safetensors", "image tokens", "feature_cache_dir")
        self.hits = 0

    @property
    def written(self) -> int:
        """Pictures that were put in so far."""
        return self._files.written

    def get(self, key: Any) -> dict[str, Tensor] | None:
        """What `put` kept; None if there is nothing, or nothing that can be read."""
        try:
            # read whole: a mapped file for each picture would soon be more than a process may have
            found = load(self._files.path(key).read_bytes())
        except (OSError, SafetensorError):
            return None
        if found.keys() != _NAMES:
            return None
        self.hits += 1
        return found

    def put(self, key: Any, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors in host memory."""

        def write(file: Path) -> None:
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            except SafetensorError as error:
                # a full disk, as safetensors says it
                raise OSError(str(error)) from error

        self._files.put(key, write)


def encoder_digest(encoder: Any, image_processor: Any, *more: object) -> str:
    """Sixteen hexadecimal digits for what image tokens depend on, except the picture.

    Args:
        encoder: a transformers model.
        more: whatever else matters, such as the precision.
    """
    digest = hashlib.blake2b(digest_size=8)
    settings = encoder.config.to_json_string(use_diff=False), image_processor.to_json_string()
    digest.update(repr((type(encoder).__name__, *settings, *more)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # as bytes, since numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
