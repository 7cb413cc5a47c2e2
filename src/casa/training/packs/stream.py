"""PackStream: batches of all readers of this process, in an order that can be gone on with from any batch.

    reader 0   batch 0         batch 2         batch 4
    reader 1           batch 1         batch 3         ...     one reader per worker of the loader, in turns

Readers run ahead of the training loop, so where the loop stands is not where they are. Every batch therefore carries
its reader's position; the position of the stream is those of the last batches that were used, and whose turn is next.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from casa.data.settings import Shard
from casa.errors import UserError
from casa.training.packs.collate import Collator
from casa.training.packs.reader import Batch, PackReader, RecordSource
from casa.training.packs.settings import PackingSettings
from casa.training.samples import SampleMaker

OpenRecords = Callable[[Shard], RecordSource]


@dataclass
class StreamPosition:
    """Which reader is next, and where each stands: what a checkpoint keeps of the data.

    Readers that have not given a batch yet have no entry. taken: packs that were used, and their facts added up.
    """

    readers: int = 1
    turn: int = 0
    positions: dict[int, str] = field(default_factory=dict)
    taken: Counter[str] = field(default_factory=Counter)

    def take(self, batch: Batch) -> None:
        """Notes that the training loop has used a batch."""
        self.positions[batch.reader] = batch.position
        self.turn = (batch.reader + 1) % self.readers
        self.taken.update({"packs": 1, **batch.facts})

    def check_readers(self, workers: int) -> None:
        """Raises UserError if it was left by another number of readers than so many worker processes are."""
        if self.positions and self.readers != max(1, workers):
            raise UserError(
                f"This run was saved with {self.readers} readers and cannot go on with {max(1, workers)}: "
                f"set workers to {self.readers}."
            )

    def to_dict(self) -> dict[str, Any]:
        positions = {str(reader): position for reader, position in self.positions.items()}
        return {"readers": self.readers, "turn": self.turn, "positions": positions, "taken": dict(self.taken)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StreamPosition":
        positions = {int(reader): position for reader, position in values["positions"].items()}
        return cls(values["readers"], values["turn"], positions, Counter(values.get("taken", {})))


class PackStream(IterableDataset):
    """Batches. open_records: called in each reader's process with its shard; it must be picklable where workers are
    spawned. rank, world: of this process among all. Set `position` before iterating to go on from there.
    """

    def __init__(
        self,
        open_records: OpenRecords,
        maker: SampleMaker,
        settings: PackingSettings,
        *,
        rank: int = 0,
        world: int = 1,
        blank: bool = True,
    ) -> None:
        self.open_records, self.maker, self.settings = open_records, maker, settings
        self.rank, self.world = rank, world
        self.collator = Collator(maker.processor, fold=maker.grids.fold, blank=blank)
        self.position = StreamPosition()

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        begun = self.position
        # the loader asks its first worker first, whose turn it may not be
        number = (worker + begun.turn) % workers
        source = self.open_records(Shard(self.rank, self.world, number, workers))
        reader = PackReader(source, self.maker, self.collator, self.settings, number)
        if (position := begun.positions.get(number)) is not None:
            reader.load(position)
        yield from reader


def open_loader(stream: PackStream, workers: int = 0, ahead: int = 2, pinned: bool = False) -> DataLoader:
    """A loader of the stream's batches, with `workers` processes (0: none) that run `ahead` batches ahead each.

    Raises UserError if the stream is to go on from a position that another number of readers has left.
    """
    stream.position.check_readers(workers)
    # a generator of its own: the loader draws a seed, which must not shift the model's random numbers
    own = torch.Generator().manual_seed(0)
    running: dict[str, Any] = {"prefetch_factor": ahead, "worker_init_fn": _prepare_worker} if workers else {}
    return DataLoader(
        stream, batch_size=None, num_workers=workers, collate_fn=_same, pin_memory=pinned, generator=own, **running
    )


def _same(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # a SIGTERM to the whole group must not end those who read before the last step is done
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
