"""Rows of a data set of the Hugging Face hub, or of a folder laid out like one, through `datasets`, streamed.

Its files are dealt out to readers as local ones are, and `datasets` keeps the position in each; nothing is downloaded
that is not read. A file that cannot be read to its end costs its rest, and the next one is begun.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casa.data.bad import BadRecord, said_by
from casa.data.formats.row import Row
from casa.data.record import Origin
from casa.data.rows import Found, dealt
from casa.data.settings import Shard, SourceSettings
from casa.errors import UserError

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
            told = said_by(error)
            raise UserError(
                f"{settings.path} cannot be opened ({told}): check its name, subset, split and your connection."
            ) from error
        assert isinstance(whole, datasets.IterableDataset)
        # bytes, not pictures: they are decoded where a sample is made of them; nothing is where features are unknown
        self._whole = whole if whole.features is None else whole.decode(False)
        self._files = self._whole.num_shards
        self._told = f"{self._name} {settings.subset} {settings.split} {self._files}"
        self._shard, self._seed, self._shuffled = shard, seed, shuffled
        self._file: Any = None
        self._at = self._row = 0

    def start(self, epoch: int, position: Any = None) -> Iterator[Found]:
        files = dealt(self._files, self._shard, [self._seed, epoch] if self._shuffled else None)
        self._at, state, self._row = (0, None, 0) if position is None else position
        folder = Path(self._name) if Path(self._name).is_dir() else Path.cwd()
        for number, mine in files[self._at :]:
            self._file = self._whole.shard(num_shards=self._files, index=number)
            if state is not None:
                self._file.load_state_dict(state)
            name = f"{PREFIX}{self._name}#{number + 1}"
            bad: BadRecord | None = None
            try:
                # plain iteration would deal the rows out once more where a loader has several workers; batches not
                for batch in self._file.iter(batch_size=1):
                    self._row += 1
                    if mine(self._row - 1):
                        value = {key: held[0] for key, held in batch.items()}
                        row = Row(self._row, value, _size(value), (self._row, 0))
                        yield Found(row, Origin(name, self._row), folder)
            # damage and lost connections come as many kinds of error
            except Exception as error:
                if isinstance(error, (MemoryError, UserError)):
                    raise
                bad = BadRecord(
                    "unreadable-file",
                    f"The file cannot be read from here on ({said_by(error)}): check your connection and the file.",
                )
            line, self._file, state = self._row + 1, None, None
            self._at, self._row = self._at + 1, 0
            # told from behind the file, where a run goes on; by each of its readers, since a connection is one reader's
            if bad is not None:
                yield Found(Row(line, bad, 0, (line, 0), last=True), Origin(name, line), folder)

    def position(self) -> Any:
        return [self._at, None if self._file is None else self._file.state_dict(), self._row]

    def fingerprint(self) -> str:
        return self._told


def _size(value: Any) -> int:
    """Bytes that a row holds, about."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8
