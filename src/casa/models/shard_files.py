"""Safetensors files, read and written one tensor at a time, so that no more than one of them is ever in memory.

A file is eight bytes with the length of its header, the header (JSON: each tensor's dtype, shape and place), and the
tensors' bytes one behind the other. All of the header is known before the first tensor is read.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from casa.atomic import replacing
from casa.errors import UserError

_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor. The file is opened for it alone: pages mapped for it go away with it."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.key)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `make` is called when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        count = self.dtype.itemsize
        for side in self.shape:
            count *= side
        return count


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint's safetensors files, by key; none is read.

    Raises UserError for a folder without such files, for weights of other kinds, and for a file that is damaged.
    """
    files = _files(folder)
    found: dict[str, Stored] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing; fetch it again.")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(key)
                    code = part.get_dtype()
                    if code not in _CODES:
                        raise UserError(f"{key} in {path} is of dtype {code}; give weights that are not quantised.")
                    found[key] = Stored(path, key, tuple(part.get_shape()), _CODES[code])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again.") from error
    return found


def _files(folder: Path) -> list[Path]:
    # in the order in which transformers looks for them
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(_nothing_to_read(folder))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # no file outside of the folder
        plain = bool(names) and all(Path(name).name == name for name in names)
    except (ValueError, KeyError, AttributeError, TypeError):
        plain = False
    if not plain:
        raise UserError(f"{index} cannot be read; fetch it again.")
    return [folder / name for name in names]


def _nothing_to_read(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder} holds its weights as pickles, which casa does not open; "
            "load them with transformers and save_pretrained them as safetensors first."
        )
    return f"{folder} has no model.safetensors nor an index of several; give the folder that save_pretrained wrote."


def write_shards(folder: Path, tensors: Sequence[Planned], most_bytes: int) -> None:
    """Writes `model.safetensors`, or several files of at most `most_bytes` (or one tensor) and their index.

    Each file appears whole or not at all. Raises UserError if the folder cannot be written.
    """
    shards = _divided(tensors, most_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as unfinished, open(unfinished, "wb") as file:
            _write(file, shard)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": dict(sorted(places.items()))}
        with replacing(folder / "model.safetensors.index.json") as unfinished:
            unfinished.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divided(tensors: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _write(file: BinaryIO, tensors: Sequence[Planned]) -> None:
    # wider dtypes first: every tensor then starts at a multiple of its own width
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        place = [offset, offset + tensor.size]
        header[tensor.name] = {"dtype": _CODE_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        made = tensor.make().to(tensor.dtype)
        if tuple(made.shape) != tensor.shape:
            raise RuntimeError(f"{tensor.name} was made in shape {tuple(made.shape)}, not {tensor.shape}")
        file.write(memoryview(made.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def check_new(path: str | os.PathLike[str]) -> None:
    """Raises UserError if `path` exists and is no empty folder."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; name a new folder.")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh folder beside `path`, which becomes `path` if the block ends well and is removed if it does not.

    Raises UserError if `path` exists and is no empty folder, or cannot be made.
    """
    check_new(path)
    target = Path(path)
    unfinished = target.absolute().parent / f".casa-{secrets.token_hex(8)}.part"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made ({error.strerror}): write elsewhere.") from error
    try:
        yield unfinished
        if target.is_dir():
            # a rename over a folder, even an empty one, is not allowed everywhere
            target.rmdir()
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500MB", "64MiB" or a bare number. Raises UserError for anything else."""
    digits = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        count = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise UserError(f"{text!r} is no size; write it as in 2GB or 500MB.")
    return count
