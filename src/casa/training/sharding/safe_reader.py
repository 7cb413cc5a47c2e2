"""The reader of distributed checkpoints that runs nothing of what they hold.

`.metadata` is a pickle, and torch's own reader calls whatever a pickle names. Here one may name the plain records that
torch writes for tensors, and nothing else. The tensors themselves are read by torch with weights_only. What is no
tensor torch would unpickle freely: its record, BytesStorageMetadata, is not among those below, and casa writes none.
"""

import pickle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import _get_layout

from casa.errors import UserError
from casa.models.loading import sentence_of

_RECORDS = (
    records.ChunkStorageMetadata,
    records.Metadata,
    records.MetadataIndex,
    records.StorageMeta,
    records.TensorProperties,
    records.TensorStorageMetadata,
    records._MEM_FORMAT_ENCODING,
    _StorageInfo,
    _get_layout,  # how a layout is written: by its name
    torch.Size,
)
_KNOWN: dict[tuple[str, str], Any] = {(kind.__module__, kind.__qualname__): kind for kind in _RECORDS}
_KNOWN |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# the folder it was written to, which nobody reads; Python 3.13 had the classes in a module of their own
_KNOWN |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}
_KNOWN |= {(module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")}


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a folder of shards, for `dcp.load(..., storage_reader=SafeReader(folder))`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> records.Metadata:
        """Names, shapes and places of all tensors. Raises UserError if the file is damaged, or names anything else."""
        file = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with file.open("rb") as stream:
                found = _RecordsOnly(stream).load()
            found.storage_meta = found.storage_meta or records.StorageMeta()
            found.storage_meta.load_id = self.load_id
        # a damaged pickle raises nearly anything
        except Exception as error:
            raise UserError(
                f"{file} is damaged, or made to run code ({sentence_of(error)}): take another checkpoint."
            ) from error
        return found


class _RecordsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]
