"""Records to samples: token ids, which of them are learned, and pictures whose tokens are counted before decoding.

maker = SampleMaker(processor, Budget(text=2048, image=20480), fold=fold_of(model.config))
for sample in maker(record):     # none, one or, where a record was split, several
    sample.text_tokens, sample.image_tokens
"""

from casa.training.samples.budget import BUDGETS, Budget
from casa.training.samples.grids import PictureGrids, fold_of
from casa.training.samples.maker import SampleMaker
from casa.training.samples.oversize import OversizeSettings
from casa.training.samples.sample import Sample, SizedPicture

__all__ = [
    "BUDGETS",
    "Budget",
    "OversizeSettings",
    "PictureGrids",
    "Sample",
    "SampleMaker",
    "SizedPicture",
    "fold_of",
]
