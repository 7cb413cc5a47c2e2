"""PackReader: one reader's way from records to batches, and its position, so that it can go on exactly from there.

    records  ->  samples  ->  buffer of the packer  ->  pack  ->  pictures opened  ->  batch
       ^                          |
       `-- position saved: a place in the records before the oldest sample that waits, and which samples wait --'

Waiting samples are not saved (their pictures may be large) but made again: from the last noted place at or before the
oldest of them, the records are read once more, and what has been packed already is passed over.
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from casa.data.bad import BadRecord
from casa.data.record import Origin, Record
from casa.errors import UserError
from casa.training.packs.collate import Collator, Prepared
from casa.training.packs.knapsack import Packer
from casa.training.packs.settings import PackingSettings
from casa.training.samples import Sample, SampleMaker

NOTE_EVERY = 32  # records between places that are noted
HOPELESS = 1000  # refusals of what was refused before, with no batch between; fewer may be chance in a mixture


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
class Batch:
    """inputs: what the model is called with. position: of the reader behind this batch, as JSON. reader: its number.

    facts: whole numbers about the batch, for logs: samples, text_tokens, image_tokens, images, learned, dropped.
    """

    inputs: dict[str, Tensor]
    position: str = ""
    reader: int = 0
    facts: dict[str, int] = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    def pin_memory(self) -> "Batch":
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return self


@dataclass(frozen=True)
class _Numbered:
    """A sample with the number of its record, which names it in saved positions."""

    sample: Sample
    record: int

    @property
    def text_tokens(self) -> int:
        return self.sample.text_tokens

    @property
    def image_tokens(self) -> int:
        return self.sample.image_tokens

    @property
    def key(self) -> list[int]:
        return [self.record, self.sample.part]

    @property
    def held_bytes(self) -> int:
        """Of its pictures: frames of videos, which are kept encoded; those that are files take none."""
        held = (sized.picture.source for sized in self.sample.pictures)
        return sum(len(source) for source in held if isinstance(source, bytes))


class PackReader:
    """Batches of one reader, one pack each. When records end, what waits is packed, and then it ends too.

    Raises UserError if records repeat and none of them can be learned from.
    """

    def __init__(
        self, source: RecordSource, maker: SampleMaker, collator: Collator, settings: PackingSettings, number: int = 0
    ) -> None:
        self._source, self._maker, self._collator, self._number = source, maker, collator, number
        self._packer: Packer[_Numbered] = Packer(
            settings.budget, settings.buffer, settings.patience, settings.buffer_bytes
        )
        self._read = 0  # records taken from the source
        self._ended = False  # whether it has no more
        self._noted: deque[tuple[int, dict[str, Any]]] = deque()
        self._saved: dict[str, Any] | None = None
        self._refused: set[Origin] = set()  # since the last batch
        self._again = 0  # of these, how many had been refused before

    def load(self, position: str) -> None:
        """Goes on behind the batch that carried this position. To be called before the first batch."""
        self._saved = json.loads(position)

    def __iter__(self) -> Iterator[Batch]:
        records = self._records()
        next(records)  # fills the packer with what waited
        while True:
            while not (self._ended or self._packer.is_full):
                samples = next(records, None)
                if samples is None:
                    self._ended = True
                else:
                    for sample in samples:
                        self._packer.add(sample)
                    if not samples:
                        self._check_hope()
            if not len(self._packer):
                return
            pack = self._packer.pack()
            batch = self._batch(pack)
            if batch is not None:
                self._refused.clear()
                self._again = 0
                yield batch
            elif not self._ended:
                self._check_hope()

    def _records(self) -> Iterator[list[_Numbered]]:
        """Nothing first, when the samples that waited are in the packer again; then those of each record."""
        saved, self._saved = self._saved, None
        if saved is not None:
            self._source.load_state_dict(saved["source"])
            self._read = saved["noted_at"]
        records = iter(self._source)
        if saved is not None:
            self._refill(records, saved)
            self._maker.counts.clear()
            self._maker.counts.update(saved["counts"])
            # records that are asked again after their end would begin their next epoch
            self._ended = saved.get("ended", False)
        yield []
        while True:
            samples = self._next(records)
            if samples is None:
                return
            yield samples

    def _refill(self, records: Iterator[Record], saved: dict[str, Any]) -> None:
        keys = [tuple(key) for key in saved["waiting"]]
        found: dict[tuple[int, ...], _Numbered] = {}
        while self._read < saved["read"]:
            samples = self._next(records)
            if samples is None:
                break
            found |= {tuple(s.key): s for s in samples if tuple(s.key) in keys}
        # a record that can no longer be read has been refused by now
        there = [(key, since) for key, since in zip(keys, saved["packer"]["since"], strict=True) if key in found]
        state = {"packs": saved["packer"]["packs"], "since": [since for _, since in there]}
        self._packer.load_state_dict(state, [found[key] for key, _ in there])
        # what was refused now was refused before the position was saved
        self._refused.clear()
        self._again = 0

    def _next(self, records: Iterator[Record]) -> list[_Numbered] | None:
        if self._read % NOTE_EVERY == 0 or not self._noted:
            self._noted.append((self._read, self._source.state_dict()))
        record = next(records, None)
        if record is None:
            return None
        number = self._read
        self._read += 1
        try:
            return [_Numbered(sample, number) for sample in self._maker(record)]
        except BadRecord as bad:
            self._refuse(record.origin, bad)
            return []

    def _refuse(self, origin: Origin, bad: BadRecord) -> None:
        self._source.refuse(origin, bad)
        self._again += origin in self._refused
        self._refused.add(origin)

    def _check_hope(self) -> None:
        """Raises UserError if the same records come again and again without a batch: they would for ever."""
        if self._again >= HOPELESS and all(entry.sample.origin in self._refused for entry in self._packer.waiting):
            least = self._maker.least
            if least is not None and not self._packer.waiting:
                raise UserError(
                    f"No record of the data fits into a pack: a budget of {least.text} text and {least.image} image "
                    "tokens would hold the smallest."
                )
            raise UserError("No record of the data can be learned from: `casa data check` tells why.")

    def _batch(self, pack: list[_Numbered]) -> Batch | None:
        """None if no sample of the pack could be prepared."""
        samples: list[Sample] = []
        prepared: list[Prepared] = []
        for entry in pack:
            try:
                prepared.append(self._collator.prepare(entry.sample))
            except BadRecord as bad:
                self._refuse(entry.sample.origin, bad)
                continue
            samples.append(entry.sample)
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
        return Batch(self._collator(samples, prepared), self._position(), self._number, facts, origins)

    def _position(self) -> str:
        waiting = self._packer.waiting
        oldest = min((entry.record for entry in waiting), default=self._read)
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
                "waiting": [entry.key for entry in waiting],
                "packer": self._packer.state_dict(),
                "counts": dict(self._maker.counts),
            }
        )
