"""Records to packed batches, in an order that can be gone on with from any batch.

    records  ->  samples  ->  buffer of the packer  ->  pack  ->  pictures opened  ->  batch
       ^                          |
       `-- position saved: a place in the records before the oldest sample that waits, and which samples wait --'

Waiting samples are not saved (their pictures may be large) but made again: from the last noted place at or before the
oldest of them, the records are read once more, and what has been packed already is passed over. Each worker of the
loader is a reader of its own, and they give batches in turns. Readers run ahead of the training loop, so every batch
carries its reader's position; the position of the dataset is those of the last batches that were used.
"""

import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from casa.data import BadRecord, DataSettings, Origin, Record, Shard, open_records
from casa.errors import UserError
from casa.training.collator import PackCollator, Tensors
from casa.training.config import PackingSettings, Recipe
from casa.training.models import LoadedModel
from casa.training.optimizer import below_lora
from casa.training.samples import SampleMaker, TrainingSample, fold_of

NOTE_EVERY = 32  # records between places that are noted
HOPELESS = 1000  # refusals of what was refused before, with no batch between; fewer may be chance in a mixture
ENOUGH = 0.99  # of either budget: a pack as full as this is not improved on, or added to
TRIES = 64  # other packs that are tried, at most


class Packable(Protocol):
    """What can be packed. held_bytes: memory that it takes while it waits, beside its tokens."""

    @property
    def text_tokens(self) -> int: ...

    @property
    def image_tokens(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...


Item = TypeVar("Item", bound=Packable)


class Packer(Generic[Item]):
    """Fills packs: a greedy knapsack over two budgets at once, from a buffer in which no item waits for ever.

        buffer, oldest first    a   b   c   d   e   f ...
        pack                    a                           the oldest always goes
                                a + d                       then the one that points most nearly where room is left
                                a + d + f + ...             until none fits
        instead, perhaps        a + b + e                   if much of both budgets is left: the fullest of the packs
                                                            that begin with the oldest and one of the next
        before, perhaps         c                           which is a full pack alone, and would only fill the buffer

    All packs but those full ones take the oldest item, and so do all once it has waited for `patience` packs: one with
    k others before it waits for at most k + `patience`. Those that have waited for as long are taken, oldest first,
    before all others that fit. The same items in the same order give the same packs.

    Attributes:
        packs: How many were made.
    """

    def __init__(self, settings: PackingSettings) -> None:
        self.settings, self.packs = settings, 0
        self._waiting: list[tuple[Item, int]] = []  # with the number of packs when it came, oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether a pack should be made before more is added."""
        held = sum(item.held_bytes for item, _ in self._waiting)
        return len(self._waiting) >= self.settings.buffer_size or held >= self.settings.buffer_mb * 2**20

    @property
    def waiting(self) -> list[Item]:
        """Those that wait, oldest first."""
        return [item for item, _ in self._waiting]

    def add(self, item: Item) -> None:
        """Raises ValueError for an item that no pack can hold."""
        budget = self.settings.budget
        if not budget.holds(item.text_tokens, item.image_tokens):
            raise ValueError(f"{item.text_tokens} text and {item.image_tokens} image tokens are more than {budget}.")
        self._waiting.append((item, self.packs))

    def pack(self) -> list[Item]:
        """The next pack, in the order of arrival; empty only if none waits."""
        if not self._waiting:
            return []
        sizes = np.array([(item.text_tokens, item.image_tokens) for item, _ in self._waiting], dtype=np.float64)
        goes = self._choose(sizes / (self.settings.budget.text, self.settings.budget.image))
        chosen = [item for (item, _), taken in zip(self._waiting, goes, strict=True) if taken]
        self._waiting = [entry for entry, taken in zip(self._waiting, goes, strict=True) if not taken]
        self.packs += 1
        return chosen

    def _choose(self, sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of those that wait go. sizes: (n, 2), in shares of the budgets."""
        waited = [self.packs - since for _, since in self._waiting]
        patience, budget = self.settings.patience, self.settings.budget
        full = sizes.max(axis=1) >= ENOUGH
        if full.any() and waited[0] < patience:
            # pieces of long videos, which hold most bytes of the buffer
            return np.arange(len(sizes)) == full.argmax()
        # sums of sizes and budgets are compared as shares; half a token is above all rounding
        slack = 0.5 / max(budget.text, budget.image)
        free = np.ones(len(sizes), dtype=bool)
        room = np.ones(2)
        for index, packs in enumerate(waited):
            if index and packs < patience:
                break
            if (sizes[index] <= room + slack).all():
                free[index] = False
                room = room - sizes[index]
        filled, left = _fill(sizes, free[None], room[None], slack)
        # few large samples, as of videos, leave gaps that other choices would not
        if left.min() > 1.0 - ENOUGH:
            starts = np.flatnonzero(free & (sizes <= room + slack).all(axis=1))[:TRIES]
            each = np.repeat(free[None], len(starts), axis=0)
            each[np.arange(len(starts)), starts] = False
            filled, left = _fill(sizes, np.vstack([filled, each]), np.vstack([left, room - sizes[starts]]), slack)
        return ~filled[left.min(axis=1).argmin()]

    def state_dict(self) -> dict[str, Any]:
        """Packs made, and since which of them each waiting item waits; the items themselves are the caller's."""
        return {"packs": self.packs, "since": [since for _, since in self._waiting]}

    def load_state_dict(self, state: dict[str, Any], items: Iterable[Item | None]) -> None:
        """Goes on from `state_dict`, with the items that waited then; None for one that is lost."""
        self.packs = state["packs"]
        self._waiting = [(item, since) for item, since in zip(items, state["since"], strict=True) if item is not None]


def _fill(
    sizes: NDArray[np.float64], free: NDArray[np.bool_], room: NDArray[np.float64], slack: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Adds to c packs what fits into each: the largest share of what is left, on both axes together; of equals, the
    oldest.

    Args:
        sizes: (n, 2), of n items that wait, in shares of the budgets.
        free: (c, n), True for those that are not in a pack.
        room: (c, 2), shares of the budgets that are left.

    Returns:
        free and room, as they are then.
    """
    free, room = free.copy(), room.copy()
    while True:
        fits = free & (sizes <= room[:, None] + slack).all(axis=-1)
        rows = np.flatnonzero(fits.any(axis=1))
        if not len(rows):
            return free, room
        score = np.where(fits, np.maximum(room, 0.0) @ sizes.T, -1.0)
        chosen = score.argmax(axis=1)[rows]
        free[rows, chosen] = False
        room[rows] -= sizes[chosen]


class RecordSource(Protocol):
    """Records of one reader, in an order that can be gone on with (`casa.data.Records` is one)."""

    def __iter__(self) -> Iterator[Record]: ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the place behind the last record that was handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def refuse(self, origin: Origin, bad: BadRecord) -> None:
        """Counts and names a record; raises UserError where the settings say strict."""
        ...


@dataclass
class PackedBatch:
    """One pack.

    Attributes:
        inputs: What the model is called with.
        position: Of the reader behind this batch, as JSON.
        reader: Its number.
        facts: Whole numbers for logs: samples, text_tokens, image_tokens, images, learned, dropped.
        origins: Where its records were read.
    """

    inputs: Tensors
    position: str = ""
    reader: int = 0
    facts: dict[str, int] = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    def pin_memory(self) -> "PackedBatch":
        """In memory that a GPU can be given at once."""
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return self


class PackReader:
    """Batches of one reader, one pack each. When records end, what waits is packed, and then it ends too.

    Raises:
        UserError: Records repeat, and none of them can be learned from.
    """

    def __init__(
        self,
        source: RecordSource,
        maker: SampleMaker,
        collator: PackCollator,
        settings: PackingSettings,
        number: int = 0,
    ) -> None:
        self._source, self._maker, self._collator, self._number = source, maker, collator, number
        self._saved: dict[str, Any] | None = None
        self._packer: Packer[TrainingSample] = Packer(settings)
        self._read = 0  # records taken from the source
        self._ended = False  # whether it has no more
        self._noted: deque[tuple[int, dict[str, Any]]] = deque()
        self._refused: Counter[Origin] = Counter()  # since the last batch, by record

    def load(self, position: str) -> None:
        """Goes on behind the batch that carried this position. To be called before the first batch."""
        self._saved = json.loads(position)

    def __iter__(self) -> Iterator[PackedBatch]:
        records = iter(self._source) if self._saved is None else self._go_on(self._saved)
        while True:
            while not (self._ended or self._packer.is_full):
                samples = self._next(records)
                self._ended = samples is None
                for sample in samples or ():
                    self._packer.add(sample)
                if samples == []:
                    self._check_hope()
            if not len(self._packer):
                return
            batch = self._batch(self._packer.pack())
            if batch is not None:
                self._refused.clear()
                yield batch
            elif not self._ended:
                self._check_hope()

    def _go_on(self, saved: dict[str, Any]) -> Iterator[Record]:
        """The records from where a saved position left them, with the samples that waited in the packer again."""
        self._source.load_state_dict(saved["source"])
        self._read = saved["noted_at"]
        records = iter(self._source)
        keys = [tuple(key) for key in saved["waiting"]]
        found: dict[tuple[int, ...], TrainingSample] = {}
        while self._read < saved["read"] and (samples := self._next(records)) is not None:
            found |= {(s.record, s.part): s for s in samples if (s.record, s.part) in keys}
        self._packer.load_state_dict(saved["packer"], [found.get(key) for key in keys])
        # what was refused now was refused before the position was saved
        self._refused.clear()
        self._maker.counts.clear()
        self._maker.counts.update(saved["counts"])
        # records that are asked again after their end would begin their next epoch
        self._ended = saved.get("ended", False)
        return records

    def _next(self, records: Iterator[Record]) -> list[TrainingSample] | None:
        """The samples of the next record; None if there is none."""
        if self._read % NOTE_EVERY == 0 or not self._noted:
            self._noted.append((self._read, self._source.state_dict()))
        record = next(records, None)
        if record is None:
            return None
        self._read += 1
        try:
            return [replace(sample, record=self._read - 1) for sample in self._maker(record)]
        except BadRecord as bad:
            self._refuse(record.origin, bad)
            return []

    def _refuse(self, origin: Origin, bad: BadRecord) -> None:
        self._source.refuse(origin, bad)
        self._refused[origin] += 1

    def _check_hope(self) -> None:
        """Raises UserError if the same records come again and again without a batch: they would for ever."""
        waiting = self._packer.waiting
        again = self._refused.total() - len(self._refused)
        if again < HOPELESS or any(sample.origin not in self._refused for sample in waiting):
            return
        least = self._maker.least
        if least is not None and not waiting:
            raise UserError(
                f"No record of the data fits into a pack: a budget of {least.text} text and {least.image} image "
                "tokens would hold the smallest."
            )
        raise UserError("No record of the data can be learned from: `casa data check` tells why.")

    def _batch(self, pack: list[TrainingSample]) -> PackedBatch | None:
        """None if no sample of the pack could be prepared."""
        samples: list[TrainingSample] = []
        prepared: list[list[Tensors]] = []
        for sample in pack:
            try:
                prepared.append(self._collator.prepare(sample))
            except BadRecord as bad:
                self._refuse(sample.origin, bad)
                continue
            samples.append(sample)
        if not samples:
            return None
        facts = {
            "samples": len(samples),
            "dropped": len(pack) - len(samples),
            "text_tokens": sum(sample.text_tokens for sample in samples),
            "image_tokens": sum(sample.image_tokens for sample in samples),
            "images": sum(len(sample.pictures) for sample in samples),
            "learned": sum(sample.learned for sample in samples),
        }
        origins = tuple(str(sample.origin) for sample in samples)
        return PackedBatch(self._collator(samples, prepared), self._position(), self._number, facts, origins)

    def _position(self) -> str:
        waiting = self._packer.waiting
        oldest = min((sample.record for sample in waiting), default=self._read)
        if not waiting:
            self._noted = deque([(self._read, self._source.state_dict())])
        while len(self._noted) > 1 and self._noted[1][0] <= oldest:
            self._noted.popleft()
        noted_at, source = self._noted[0]
        return json.dumps(
            {
                "source": source,
                "noted_at": noted_at,
                "read": self._read,
                "ended": self._ended,
                "waiting": [(sample.record, sample.part) for sample in waiting],
                "packer": self._packer.state_dict(),
                "counts": dict(self._maker.counts),
            }
        )


@dataclass
class DataPosition:
    """Which reader is next, and where each stands: what a checkpoint keeps of the data.

    Attributes:
        positions: Of each reader; those that have not given a batch yet have no entry.
        taken: Packs that were used, and their facts added up.
    """

    readers: int = 1
    turn: int = 0
    positions: dict[int, str] = field(default_factory=dict)
    taken: Counter[str] = field(default_factory=Counter)

    def take(self, batch: PackedBatch) -> None:
        """Notes that the training loop has used a batch."""
        self.positions[batch.reader] = batch.position
        self.turn = (batch.reader + 1) % self.readers
        self.taken.update({"packs": 1, **batch.facts})

    def check_readers(self, workers: int) -> None:
        """Raises UserError if it was left by another number of readers than so many worker processes are."""
        if self.positions and self.readers != max(1, workers):
            raise UserError(
                f"This run was saved with {self.readers} readers and cannot go on with {max(1, workers)}: "
                f"set num_workers to {self.readers}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"readers": self.readers, "turn": self.turn, "positions": self.positions, "taken": self.taken}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataPosition":
        """Reads what `to_dict` gave, through JSON too."""
        positions = {int(reader): position for reader, position in values["positions"].items()}
        return cls(values["readers"], values["turn"], positions, Counter(values.get("taken", {})))


class PackedDataset(IterableDataset):
    """Batches of all readers of this process. Set `position` before iterating to go on from there.

    Args:
        open_records: Called with `shard=` in each reader's process; it must be picklable where workers are spawned.
        rank, world: Of this process among all.
    """

    def __init__(
        self,
        open_records: Callable[..., RecordSource],
        maker: SampleMaker,
        settings: PackingSettings,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.open_records, self.maker, self.settings = open_records, maker, settings
        self.rank, self.world = rank, world
        self.collator = PackCollator(maker.processor, fold=maker.grids.fold)
        self.position = DataPosition()

    def __iter__(self) -> Iterator[PackedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        begun = self.position
        # the loader asks its first worker first, whose turn it may not be
        number = (worker + begun.turn) % workers
        source = self.open_records(shard=Shard(self.rank, self.world, number, workers))
        reader = PackReader(source, self.maker, self.collator, self.settings, number)
        if (position := begun.positions.get(number)) is not None:
            reader.load(position)
        yield from reader


def sample_maker(packing: PackingSettings, loaded: LoadedModel) -> SampleMaker:
    """What makes the samples of a run; the weights of its model are not looked at."""
    fold = fold_of(below_lora(loaded.model).config)
    return SampleMaker(loaded.processor, packing.budget, packing.oversize, fold=fold, stop=loaded.stop)


def open_dataset(
    recipe: Recipe,
    loaded: LoadedModel,
    data: DataSettings | None = None,
    *,
    report: Path | None = None,
    keep_frames: str | None = None,
) -> PackedDataset:
    """The packs of a recipe, or of other data than its own; report, keep_frames: as in `open_records`."""
    records = partial(open_records, data or recipe.data, seed=recipe.seed, report=report, keep_frames=keep_frames)
    return PackedDataset(records, sample_maker(recipe.packing, loaded), recipe.packing)


def packed_dataloader(
    dataset: PackedDataset, num_workers: int = 0, prefetch_factor: int = 2, pin_memory: bool = False
) -> DataLoader:
    """A loader of the dataset's batches.

    Args:
        num_workers: Processes that read; 0 reads in this one.
        prefetch_factor: Batches that each of them reads ahead.

    Raises:
        UserError: The dataset is to go on from a position that another number of readers has left.
    """
    dataset.position.check_readers(num_workers)
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_same,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=_prepare_worker,
        # of its own: the loader draws a seed, which must not shift the model's random numbers
        generator=torch.Generator().manual_seed(0),
    )


def _same(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # a SIGTERM to the whole group must not end those who read before the last step is done
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
