"""Image tokens of a frozen tower in a folder: a run that goes on, and a twin beside it, encode no picture again.

    FOLDER/<tower>/<key>.safetensors     image_features (N, d_v), image_grid_thw (1, 3)

<tower> stands for the tower (its class, config and weights), the image processor and the precision; <key> for the
picture's bytes (or its file's path, time and size) and the most tokens that it may have.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from casa.kept_files import KeptFiles

_NAMES = {"image_features", "image_grid_thw"}


class FeatureFolder:
    """tower: what the tokens are made with, as `tower_name` gives it. Raises UserError if the folder cannot be made.

    found: pictures that were at hand so far.
    """

    def __init__(self, folder: str | Path, tower: str) -> None:
        self._files = KeptFiles(Path(folder) / tower, ".safetensors", "image tokens", "keep_folder")
        self.found = 0

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
        self.found += 1
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


def tower_name(encoder: Any, image_processor: Any, *more: object) -> str:
    """Sixteen hexadecimal digits for what image tokens depend on, except the picture.

    encoder: a transformers model. more: whatever else matters, such as the precision.
    """
    digest = hashlib.blake2b(digest_size=8)
    settings = encoder.config.to_json_string(use_diff=False), image_processor.to_json_string()
    digest.update(repr((type(encoder).__name__, *settings, *more)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # as bytes, since numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
