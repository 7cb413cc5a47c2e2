"""Collator: samples in one row, as CasaForConditionalGeneration takes them; their pictures are opened here.

Shapes: T text tokens of all samples, n pictures, P patches and N image tokens of all pictures, c channels of a patch,
d_v width of the tower's output.

    input_ids     a a a a a b b b      two samples
    position_ids  0 1 2 3 4 0 1 2      restart with every sample: that is how samples are kept apart
    labels        - - - a a - b b      answers only; the first token of a sample is never one
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from casa.data.bad import BadRecord
from casa.data.pictures import open_one
from casa.models import CasaProcessor
from casa.models.losses import IGNORE_INDEX
from casa.training.packs.kept import KeptFeatures
from casa.training.samples import PictureGrids, Sample
from casa.training.samples.sample import SizedPicture

Prepared = list[dict[str, Tensor]]
"""Of each picture of a sample: `pixel_values`, or `image_features` where these are kept, and `image_grid_thw`."""

_OF_PICTURES = ("pixel_values", "image_features", "image_grid_thw")


class Collator:
    """Makes batches of one row.

    blank: a batch without a picture gets a blank one, in a sample of one token that nothing is learned from, so that
    every parameter takes part in every step (distributed training waits for all gradients of all ranks).
    kept: gives a picture's image tokens in place of its pixels.
    """

    def __init__(self, processor: CasaProcessor, *, fold: int | None = None, blank: bool = True) -> None:
        self.processor, self.fold, self.blank = processor, fold, blank
        self.kept: KeptFeatures | None = None
        self._grids = PictureGrids(processor.image_processor, fold)

    def prepare(self, sample: Sample) -> Prepared:
        """Opens and prepares a sample's pictures. Raises BadRecord for one that cannot be read."""
        found = []
        for number, sized in enumerate(sample.pictures, start=1):
            pixels = partial(self._opened, sized, number)
            found.append(pixels() if self.kept is None else self.kept.get(sized, pixels))
        return found

    def _opened(self, sized: SizedPicture, number: int) -> dict[str, Tensor]:
        image = open_one(sized.picture, number)
        try:
            return self._pixels(image, self._grids.arguments(sized.most_tokens))
        except ValueError as error:
            raise BadRecord("unreadable-picture", f"Picture {number} cannot be prepared: {error}") from error

    def __call__(self, samples: Sequence[Sample], prepared: Sequence[Prepared] | None = None) -> dict[str, Tensor]:
        """The batch of these samples: input_ids, position_ids and labels, int64 (1, T); image_positions, int64 (n, 2);
        image_grid_thw, int64 (n, 3); pixel_values, float32 (P, c), or (n, 3, H, W) for towers that see squares, or in
        their place image_features (N, d_v), if they are kept.

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
            blank = self._pixels(Image.new("RGB", (32, 32)), self._grids.arguments(1))
            pictures = [blank if self.kept is None else self.kept.encoded(blank)]
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
        }
        if pictures:
            batch["image_positions"] = torch.tensor(places)
            for name in _OF_PICTURES:
                if name in pictures[0]:
                    batch[name] = torch.cat([picture[name] for picture in pictures])
        return batch

    def _pixels(self, image: Image.Image, arguments: dict[str, Any]) -> dict[str, Tensor]:
        found = self.processor.image_processor(images=[image], return_tensors="pt", **copy.deepcopy(arguments))
        return {name: found[name] for name in ("pixel_values", "image_grid_thw")}
