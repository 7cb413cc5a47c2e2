"""Several samples in one row, so that no computing goes to padding (paper, section 4, "Sequence packing").

Legend: B rows, T tokens per row, n pictures
    input_ids, position_ids, labels int64 (B, T); image_positions int64 (n, 2): row, index in the row

    row        a a a a a b b b . .      two samples, then padding
    positions  0 1 2 3 4 0 1 2 0 1      restart with every sample: that is how transformers knows the borders
    labels     - - - a a - b b - -      answers only; -100 elsewhere

The first token of a sample is never a label: the token before it belongs to another sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casa.models.losses import IGNORE_INDEX
from casa.training.conversation import Sample


@dataclass(frozen=True)
class PackedRows:
    """One batch. pictures: (sample, picture of that sample) in the order of image_positions."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    image_positions: Tensor
    pictures: tuple[tuple[int, int], ...]

    @property
    def learned(self) -> int:
        """How many tokens the loss counts."""
        return int((self.labels != IGNORE_INDEX).sum())


def pack(samples: Sequence[Sample], row_tokens: int, pad: int) -> PackedRows:
    """Samples, longest first, each into the first row with room; rows have the length of the fullest.

    ValueError if a sample is empty, or longer than `row_tokens`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i)):
        length = len(samples[index])
        if not 0 < length <= row_tokens:
            raise ValueError(f"a sample has {length} tokens; a row holds 1 to {row_tokens}.")
        row = next((number for number, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= length

    width = row_tokens - min(room, default=row_tokens)
    input_ids = torch.full((len(rows), width), pad)
    position_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    places: list[tuple[int, int]] = []
    pictures: list[tuple[int, int]] = []
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            sample = samples[index]
            stop = start + len(sample)
            ids = torch.tensor(sample.ids)
            learn = torch.tensor(sample.learn)
            learn[0] = False
            input_ids[row, start:stop] = ids
            position_ids[row, start:stop] = torch.arange(len(sample))
            labels[row, start:stop] = torch.where(learn, ids, IGNORE_INDEX)
            places += [(row, start + place) for place in sample.places]
            pictures += [(index, number) for number in range(len(sample.places))]
            start = stop
        position_ids[row, start:] = torch.arange(width - start)
    return PackedRows(
        input_ids, position_ids, labels, torch.tensor(places, dtype=torch.int64).view(-1, 2), tuple(pictures)
    )
