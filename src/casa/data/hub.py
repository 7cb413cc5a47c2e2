"""Rows of a data set of the Hugging Face hub, or of a folder laid out like one, through `datasets`, streamed.

`datasets` deals the rows out to readers and keeps the position; nothing is downloaded that is not read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casa.data.formats.row import Row
from casa.data.record import Origin
from casa.data.rows import Found
from casa.data.settings import Shard, SourceSettings
from casa.errors import UserError

PREFIX = "hub:"


class HubRows:
    """Rows of the split that the settings name. Pictures stay bytes."""

    def __init__(self, settings: SourceSettings, shard: Shard) -> None:
        try:
            import datasets
            from datasets.distributed import split_dataset_by_node
        except ImportError as error:
            raise UserError("Data of the hub need datasets: install casa-vlm[train].") from error
        self._name = settings.path.removeprefix(PREFIX)
        try:
            whole = datasets.load_dataset(self._name, settings.subset, split=settings.split, streaming=True)
        # what is missing, misspelt, private or offline comes as many kinds of error
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            told = str(error).strip().split("\n")[0].rstrip(".")
            raise UserError(
                f"{settings.path} cannot be opened ({told}): check its name, subset, split and your connection."
            ) from error
        assert isinstance(whole, datasets.IterableDataset)
        self._told = f"{self._name} {settings.subset} {settings.split}"
        # bytes, not pictures: they are decoded where a sample is made of them
        self._data = split_dataset_by_node(whole.decode(False), rank=shard.index, world_size=shard.count)
        self._start = self._data.state_dict()
        self._taken = 0

    def start(self, epoch: int, position: Any = None) -> Iterator[Found]:
        state, self._taken = (self._start, 0) if position is None else position
        self._data.load_state_dict(state)
        folder = Path(self._name) if Path(self._name).is_dir() else Path.cwd()
        for value in self._data:
            self._taken += 1
            row = Row(self._taken, value, _size(value), (self._taken, 0))
            yield Found(row, Origin(PREFIX + self._name, self._taken), folder)

    def position(self) -> Any:
        return [self._data.state_dict(), self._taken]

    def fingerprint(self) -> str:
        return self._told


def _size(value: Any) -> int:
    """Bytes that a row holds, about."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
