"""Collator: samples in one row, as CasaForConditionalGeneration takes them; their pictures are opened here.

Shapes: T text tokens of all samples, n pictures, P patches of all pictures, c channels of a patch.

    input_ids     a a a a a b b b      two samples
    position_ids  0 1 2 3 4 0 1 2      restart with every sample: that is how samples are kept apart
    labels        - - - a a - b b      answers only; the first token of a sample is never one
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from casa.data.bad import BadRecord
from casa.data.pictures import open_one
from casa.models import CasaProcessor
from casa.training.samples import PictureGrids, Sample

IGNORED = -100
Prepared = list[dict[str, Tensor]]
"""Of each picture of a sample: `pixel_values` and `image_grid_thw`."""


class Collator:
    """Makes batches of one row.

    blank: a batch without a picture gets a blank one, in a sample of one token that nothing is learned from, so that
    every parameter takes part in every step (distributed training waits for all gradients of all ranks).
    """

    def __init__(self, processor: CasaProcessor, *, fold: int | None = None, blank: bool = True) -> None:
        self.processor, self.blank = processor, blank
        self._grids = PictureGrids(processor.image_processor, fold)

    def prepare(self, sample: Sample) -> Prepared:
        """Opens and prepares a sample's pictures. Raises BadRecord for one that cannot be read."""
        found = []
        for number, sized in enumerate(sample.pictures, start=1):
            image = open_one(sized.picture, number)
            try:
                found.append(self._pixels(image, self._grids.arguments(sized.most_tokens)))
            except ValueError as error:
                raise BadRecord("unreadable-picture", f"Picture {number} cannot be prepared: {error}") from error
        return found

    def __call__(self, samples: Sequence[Sample], prepared: Sequence[Prepared] | None = None) -> dict[str, Tensor]:
        """The batch of these samples: input_ids, position_ids and labels, int64 (1, T); image_positions, int64 (n, 2);
        image_grid_thw, int64 (n, 3); pixel_values, float32 (P, c), or (n, 3, H, W) for towers that see squares.

        prepared: what `prepare` gave for each sample; they are prepared now if left out.
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
            labels.append(IGNORED)
            pairs = zip(sample.ids[1:], sample.learn[1:], strict=True)
            labels += [token if learned else IGNORED for token, learned in pairs]
            positions += range(len(sample.ids))
            ids += sample.ids
        if not pictures and self.blank:
            places.append((0, len(ids)))
            ids.append(ids[-1] if ids else 0)
            positions.append(0)
            labels.append(IGNORED)
            pictures = [self._pixels(Image.new("RGB", (32, 32)), self._grids.arguments(1))]
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
        }
        if pictures:
            batch["image_positions"] = torch.tensor(places)
            for name in ("pixel_values", "image_grid_thw"):
                batch[name] = torch.cat([picture[name] for picture in pictures])
        return batch

    def _pixels(self, image: Image.Image, arguments: dict[str, Any]) -> dict[str, Tensor]:
        found = self.processor.image_processor(images=[image], return_tensors="pt", **copy.deepcopy(arguments))
        return {name: found[name] for name in ("pixel_values", "image_grid_thw")}
