"""Samples to packs: rows filled to two budgets at once, as batches for the model, resumable at any of them.

stream = PackStream(open_records, maker, PackingSettings(budget=BUDGETS["image"]))
for batch in stream:
    loss = model(**batch.inputs).loss
"""

from casa.training.packs.collate import IGNORE_INDEX, Collator
from casa.training.packs.efficiency import Efficiency, measure_packing
from casa.training.packs.knapsack import Packer
from casa.training.packs.lengths import Length, spread_lengths, stage_lengths
from casa.training.packs.listed import ListedRecords
from casa.training.packs.reader import Batch, PackReader, RecordSource
from casa.training.packs.settings import PackingSettings
from casa.training.packs.stream import PackStream, StreamPosition, open_loader

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Collator",
    "Efficiency",
    "Length",
    "ListedRecords",
    "PackReader",
    "PackStream",
    "Packer",
    "PackingSettings",
    "RecordSource",
    "StreamPosition",
    "measure_packing",
    "open_loader",
    "spread_lengths",
    "stage_lengths",
]
