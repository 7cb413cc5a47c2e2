"""Records to packed batches, in an order that can be gone on with from any batch.

    records  ->  samples  ->  buffer of the packer  ->  pack  ->  pictures opened  ->  batch
       ^                          |
       `-- position saved: a place in the records before the oldest sample that waits, and which samples wait --'

Waiting samples are not saved (their pictures may be large) but made again: from the last noted place at or before the
oldest of them, the records are read once more, and what has been packed already is passed over. Each worker of the
loader is a reader of its own, and they give batches in turns:

    reader 0   batch 0         batch 2         batch 4
    reader 1           batch 1         batch 3         ...

Readers run ahead of the training loop, so where the loop stands is not where they are. Every batch therefore carries
its reader's position; the position of the dataset is those of the last batches that were used, and whose turn is next.
"""

import copy
import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from casa.data import BadRecord, Origin, Record, Shard
from casa.data.pictures import open_one
from casa.errors import UserError
from casa.models import CasaProcessor
from casa.models.losses import IGNORE_INDEX
from casa.training.config import PackingSettings
from casa.training.feature_cache import FeatureCache
from casa.training.packing import Packer
from casa.training.samples import PictureGrids, SampleMaker, SizedPicture, TrainingSample

NOTE_EVERY = 32  # records between places that are noted
HOPELESS = 1000  # refusals of what was refused before, with no batch between; fewer may be chance in a mixture

PreparedPictures = list[dict[str, Tensor]]
"""Of each picture of a sample: `pixel_values`, or `image_features` where these are kept, and `image_grid_thw`."""


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


class PackCollator:
    """Makes batches of one row, as CasaForConditionalGeneration takes them; pictures are opened here.

        input_ids     a a a a a b b b      two samples
        position_ids  0 1 2 3 4 0 1 2      restart with every sample: that is how samples are kept apart
        labels        - - - a a - b b      answers only; the first token of a sample is never one

    Args:
        blank: a batch without a picture gets a blank one, in a sample of one token that nothing is learned from, so
            that every parameter takes part in every step (distributed training waits for all gradients of all ranks).

    Attributes:
        cache: gives a picture's image tokens in place of its pixels.
    """

    def __init__(self, processor: CasaProcessor, *, fold: int | None = None, blank: bool = True) -> None:
        self.processor, self.fold, self.blank = processor, fold, blank
        self.cache: FeatureCache | None = None
        self._grids = PictureGrids(processor.image_processor, fold)

    def prepare(self, sample: TrainingSample) -> PreparedPictures:
        """Opens and prepares a sample's pictures. Raises BadRecord for one that cannot be read."""
        found = []
        for number, sized in enumerate(sample.pictures, start=1):
            pixels = partial(self._opened, sized, number)
            found.append(pixels() if self.cache is None else self.cache.get(sized, pixels))
        return found

    def _opened(self, sized: SizedPicture, number: int) -> dict[str, Tensor]:
        image = open_one(sized.picture, number)
        try:
            return self._pixels(image, sized.max_tokens)
        except ValueError as error:
            raise BadRecord("unreadable-picture", f"Picture {number} cannot be prepared: {error}") from error

    def _pixels(self, image: Image.Image, max_tokens: int | None) -> dict[str, Tensor]:
        arguments = copy.deepcopy(self._grids.arguments(max_tokens))
        found = self.processor.image_processor(images=[image], return_tensors="pt", **arguments)
        return {name: found[name] for name in ("pixel_values", "image_grid_thw")}

    def __call__(
        self, samples: Sequence[TrainingSample], prepared: Sequence[PreparedPictures] | None = None
    ) -> dict[str, Tensor]:
        """The batch of these samples, of T text tokens, n pictures, P patches and N image tokens.

        Args:
            prepared: what `prepare` gave for each sample; they are prepared now if left out.

        Returns:
            input_ids, position_ids and labels, int64 (1, T); image_positions, int64 (n, 2); image_grid_thw, int64
            (n, 3); pixel_values, float32 (P, c), or (n, 3, H, W) for encoders that see squares, or in their place
            image_features (N, d_v), if they are kept.
        """
        if prepared is None:
            prepared = [self.prepare(sample) for sample in samples]
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        places: list[tuple[int, int]] = []
        pictures = [picture for each in prepared for picture in each]
        for sample in samples:
            places += [(0, len(ids) + place) for place in sample.places]
            labels.append(IGNORE_INDEX)
            pairs = zip(sample.ids[1:], sample.learn[1:], strict=True)
            labels += [token if learned else IGNORE_INDEX for token, learned in pairs]
            positions += range(len(sample.ids))
            ids += sample.ids
        if not pictures and self.blank:
            places.append((0, len(ids)))
            ids.append(ids[-1] if ids else 0)
            positions.append(0)
            labels.append(IGNORE_INDEX)
            blank = self._pixels(Image.new("RGB", (32, 32)), 1)
            pictures = [blank if self.cache is None else self.cache.encoded(blank)]
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
        }
        if pictures:
            batch["image_positions"] = torch.tensor(places)
            batch |= {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
        return batch


@dataclass
class PackedBatch:
    """One pack.

    Attributes:
        inputs: what the model is called with.
        position: of the reader behind this batch, as JSON. reader: its number.
        facts: whole numbers for logs: samples, text_tokens, image_tokens, images, learned, dropped.
        origins: where its records were read.
    """

    inputs: dict[str, Tensor]
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
        UserError: records repeat, and none of them can be learned from.
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
        self._packer: Packer[TrainingSample] = Packer.from_settings(settings)
        self._read = 0  # records taken from the source
        self._ended = False  # whether it has no more
        self._noted: deque[tuple[int, dict[str, Any]]] = deque()
        self._saved: dict[str, Any] | None = None
        self._refused: set[Origin] = set()  # since the last batch
        self._again = 0  # of these, how many had been refused before

    def load(self, position: str) -> None:
        """Goes on behind the batch that carried this position. To be called before the first batch."""
        self._saved = json.loads(position)

    def __iter__(self) -> Iterator[PackedBatch]:
        records = self._begin()
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
                self._again = 0
                yield batch
            elif not self._ended:
                self._check_hope()

    def _begin(self) -> Iterator[Record]:
        """The records from where a saved position left them, with the samples that waited in the packer again."""
        saved, self._saved = self._saved, None
        if saved is None:
            return iter(self._source)
        self._source.load_state_dict(saved["source"])
        self._read = saved["noted_at"]
        records = iter(self._source)
        keys = [tuple(key) for key in saved["waiting"]]
        found: dict[tuple[int, ...], TrainingSample] = {}
        while self._read < saved["read"] and (samples := self._next(records)) is not None:
            found |= {(s.record, s.part): s for s in samples if (s.record, s.part) in keys}
        # a record that can no longer be read has been refused by now
        there = [(key, since) for key, since in zip(keys, saved["packer"]["since"], strict=True) if key in found]
        state = {"packs": saved["packer"]["packs"], "since": [since for _, since in there]}
        self._packer.load_state_dict(state, [found[key] for key, _ in there])
        # what was refused now was refused before the position was saved
        self._refused.clear()
        self._again = 0
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
        number = self._read
        self._read += 1
        try:
            return [replace(sample, record=number) for sample in self._maker(record)]
        except BadRecord as bad:
            self._refuse(record.origin, bad)
            return []

    def _refuse(self, origin: Origin, bad: BadRecord) -> None:
        self._source.refuse(origin, bad)
        self._again += origin in self._refused
        self._refused.add(origin)

    def _check_hope(self) -> None:
        """Raises UserError if the same records come again and again without a batch: they would for ever."""
        waiting = self._packer.waiting
        if self._again < HOPELESS or any(sample.origin not in self._refused for sample in waiting):
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
        prepared: list[PreparedPictures] = []
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
            self._noted.clear()
            self._noted.append((self._read, self._source.state_dict()))
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
        positions: of each reader; those that have not given a batch yet have no entry.
        taken: packs that were used, and their facts added up.
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
        positions = {str(reader): position for reader, position in self.positions.items()}
        return {"readers": self.readers, "turn": self.turn, "positions": positions, "taken": dict(self.taken)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataPosition":
        """Reads what `to_dict` gave."""
        positions = {int(reader): position for reader, position in values["positions"].items()}
        return cls(values["readers"], values["turn"], positions, Counter(values.get("taken", {})))


class PackedDataset(IterableDataset):
    """Batches of all readers of this process. Set `position` before iterating to go on from there.

    Args:
        open_records: called with `shard=` in each reader's process; it must be picklable where workers are spawned.
        rank, world: of this process among all.
    """

    def __init__(
        self,
        open_records: Callable[..., RecordSource],
        maker: SampleMaker,
        settings: PackingSettings,
        *,
        rank: int = 0,
        world: int = 1,
        blank: bool = True,
    ) -> None:
        self.open_records, self.maker, self.settings = open_records, maker, settings
        self.rank, self.world = rank, world
        self.collator = PackCollator(maker.processor, fold=maker.grids.fold, blank=blank)
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


def packed_dataloader(
    dataset: PackedDataset, num_workers: int = 0, prefetch_factor: int = 2, pin_memory: bool = False
) -> DataLoader:
    """A loader of the dataset's batches, with worker processes (0: none) that run `prefetch_factor` batches ahead each.

    Raises:
        UserError: the dataset is to go on from a position that another number of readers has left.
    """
    dataset.position.check_readers(num_workers)
    # a generator of its own: the loader draws a seed, which must not shift the model's random numbers
    own = torch.Generator().manual_seed(0)
    ahead: dict[str, Any] = {}
    if num_workers:
        ahead = {"prefetch_factor": prefetch_factor, "worker_init_fn": _prepare_worker}
    return DataLoader(
        dataset, batch_size=None, num_workers=num_workers, collate_fn=_same, pin_memory=pin_memory, generator=own,
        **ahead,
    )  # fmt: skip


def _same(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # a SIGTERM to the whole group must not end those who read before the last step is done
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
