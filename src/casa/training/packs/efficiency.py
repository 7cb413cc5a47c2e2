"""How well packs are filled, and what of a batch goes to padding without them.

packed      1 - tokens / (packs * budget), for text and for images
padded      the same samples in batches of one row each, filled up to the longest
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from casa.training.packs.knapsack import Packer, Sized
from casa.training.packs.settings import PackingSettings
from casa.training.samples import Budget


@dataclass(frozen=True)
class Length:
    """A sample of which only the lengths are known."""

    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Efficiency:
    """packs: how many. samples: in them. text_waste, image_waste: shares of the budgets that stayed empty.

    longest_wait: packs that a sample waited for, at most. padded_waste: share of text tokens that are padding when the
    same samples stand in batches of as many rows as a pack holds samples.
    """

    packs: int
    samples: int
    text_waste: float
    image_waste: float
    longest_wait: int
    padded_waste: float

    def __str__(self) -> str:
        return (
            f"{self.samples} samples in {self.packs} packs; empty: {self.text_waste:.1%} of the text budget, "
            f"{self.image_waste:.1%} of the image budget; longest wait {self.longest_wait} packs; padded batches "
            f"of the same samples waste {self.padded_waste:.1%}"
        )


def measure_packing(samples: Iterable[Sized], settings: PackingSettings) -> Efficiency:
    """Packs samples as a run without end would: the packs that empty the buffer at the end are left out."""
    packer: Packer = Packer(settings.budget, settings.buffer, settings.patience)
    packs: list[list[Sized]] = []
    since: dict[int, int] = {}
    longest = 0
    for sample in samples:
        packer.add(sample)
        since[id(sample)] = packer.packs
        if packer.is_full:
            pack = packer.pack()
            longest = max(longest, *(packer.packs - 1 - since[id(item)] for item in pack))
            packs.append(pack)
    text = sum(item.text_tokens for pack in packs for item in pack)
    image = sum(item.image_tokens for pack in packs for item in pack)
    count = sum(map(len, packs))
    return Efficiency(
        packs=len(packs),
        samples=count,
        text_waste=1 - text / (settings.budget.text * max(1, len(packs))),
        image_waste=1 - image / (settings.budget.image * max(1, len(packs))),
        longest_wait=longest,
        padded_waste=_padded_waste(
            [item for pack in packs for item in pack], max(1, round(count / max(1, len(packs))))
        ),
    )


def spread_lengths(
    count: int, budget: Budget, seed: int = 0, images: float = 640.0, spread: float = 0.7
) -> list[Length]:
    """Lengths as the paper's data have them: log-normal, from thumbnails and one-word answers to pages and essays.

    images: median image tokens of a sample. spread: deviation of the logarithms. Text and image tokens are in the
    proportion of the budget, less a twelfth of the text: image tokens are what a pack runs out of.
    """
    generator = np.random.default_rng(seed)
    factor = math.exp(spread**2 / 2)
    image = generator.lognormal(math.log(images), spread, count)
    mean_text = 0.92 * images * factor * budget.text / budget.image
    text = generator.lognormal(math.log(mean_text / factor), spread, count)
    return [
        Length(int(min(max(2, t), budget.text)), int(min(max(1, i), budget.image)))
        for t, i in zip(text, image, strict=True)
    ]


def _padded_waste(items: Sequence[Sized], rows: int) -> float:
    padded = real = 0
    for start in range(0, len(items) - rows + 1, rows):
        lengths = [item.text_tokens for item in items[start : start + rows]]
        padded += rows * max(lengths)
        real += sum(lengths)
    return 1 - real / padded if padded else 0.0
