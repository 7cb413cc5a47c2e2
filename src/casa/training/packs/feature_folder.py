"""Image tokens of a frozen tower in a folder: a run that goes on, and a twin beside it, encode no picture again.

    FOLDER/<tower>/<two digits>/<picture>.safetensors     image_features (N, d_v), image_grid_thw (1, 3)

<tower> stands for the tower (its class, config and weights), the image processor and the precision; <picture> for the
picture's bytes (or its file's path, time and size) and the most tokens that it may have. Processes may share a folder:
each file appears whole. Nothing is ever removed from it.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from casa.atomic import replacing
from casa.errors import UserError

_log = logging.getLogger(__name__)
_NAMES = {"image_features", "image_grid_thw"}


class FeatureFolder:
    """tower: what the tokens are made with, as `tower_name` gives it. Raises UserError if the folder cannot be made.

    read, written: pictures so far.
    """

    def __init__(self, folder: str | Path, tower: str) -> None:
        self._folder = Path(folder) / tower
        self._writes = True
        self.read = self.written = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}): name another keep_folder.") from error

    def get(self, key: Any) -> dict[str, Tensor] | None:
        """What `put` kept; None if there is nothing, or nothing that can be read."""
        try:
            # read whole: a mapped file for each picture would soon be more than a process may have
            found = load(self._path(key).read_bytes())
        except (OSError, SafetensorError):
            return None
        if found.keys() != _NAMES:
            return None
        self.read += 1
        return found

    def put(self, key: Any, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors in host memory. A folder that takes no more, its disk being full, is only read from then on."""
        if not self._writes:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as unfinished:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        except (OSError, SafetensorError, UserError) as error:
            self._writes = False
            _log.warning("image tokens are no longer kept in %s: %s", self._folder, error)
        else:
            self.written += 1

    def _path(self, key: Any) -> Path:
        name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.safetensors"


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
