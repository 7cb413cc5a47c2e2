"""Rows of a data set of the Hugging Face hub, or of a folder laid out like one, through `datasets`, streamed.

Its files are dealt out to readers as local ones are, and `datasets` keeps the position in each; nothing is downloaded
that is not read. A file that cannot be read to its end costs its rest, and the next one is begun.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa.data.formats import Row
from casa.data.record import BadRecord, Origin, first_line
from casa.data.settings import Shard, SourceSettings
from casa.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

PREFIX = "hub:"


class HubRows:
    """Rows of the split that the settings name, pictures as bytes. shuffled: files come in another order each epoch."""

    def __init__(self, settings: SourceSettings, shard: Shard, seed: int, shuffled: bool) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError("Data of the hub need datasets: install casa-vlm[train].") from error
        self._name = settings.path.removeprefix(PREFIX)
        try:
            whole = datasets.load_dataset(self._name, settings.subset, split=settings.split, streaming=True)
        # what is missing, misspelt, private or offline comes as many kinds of error
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            raise UserError(
                f"{settings.path} cannot be opened ({first_line(error)}): check its name, subset, split and your "
                "connection."
            ) from error
        assert isinstance(whole, datasets.IterableDataset)
        # bytes, not pictures: they are decoded where a sample is made of them; nothing is where features are unknown
        self._whole = whole if whole.features is None else whole.decode(False)
        self._files = self._whole.num_shards
        self.fingerprint = f"{self._name} {settings.subset} {settings.split} {self._files}"
        self._shard, self._seed, self._shuffled = shard, seed, shuffled
        self._file: IterableDataset | None = None
        self._at = self._row = 0

    def start(self, epoch: int, position: list[Any] | None = None) -> Iterator[Row]:
        """The rows of an epoch, from a position on (None: all). One iteration at a time."""
        files = self._shard.share(self._files, [self._seed, epoch] if self._shuffled else None)
        self._at, state, self._row = (0, None, 0) if position is None else position
        folder = Path(self._name) if Path(self._name).is_dir() else Path.cwd()
        for number, mine in files[self._at :]:
            file = self._file = self._whole.shard(num_shards=self._files, index=number)
            if state is not None:
                file.load_state_dict(state)
            name = f"{PREFIX}{self._name}#{number + 1}"
            bad: BadRecord | None = None
            try:
                # plain iteration would deal the rows out once more where a loader has several workers; batches not
                for batch in file.iter(batch_size=1):
                    self._row += 1
                    if mine(self._row - 1):
                        value = {key: held[0] for key, held in batch.items()}
                        yield Row(Origin(name, self._row), value, (self._row, 0), _size(value), folder)
            # damage and lost connections come as many kinds of error
            except Exception as error:
                if isinstance(error, (MemoryError, UserError)):
                    raise
                bad = BadRecord(
                    "unreadable-file",
                    f"The file cannot be read from here on ({first_line(error)}): check your connection and the file.",
                )
            line, self._file, state = self._row + 1, None, None
            self._at, self._row = self._at + 1, 0
            # given from behind the file, where a run goes on; by each of its readers: a connection is one reader's
            if bad is not None:
                yield Row(Origin(name, line), bad, (line, 0), folder=folder, last=True)

    def position(self) -> list[Any]:
        """Where the running iteration stands, before the next row, as plain values."""
        return [self._at, None if self._file is None else self._file.state_dict(), self._row]


def _size(value: object) -> int:
    """Bytes that a row holds, about."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
