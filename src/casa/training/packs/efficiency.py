"""How well packs are filled, and what of a batch goes to padding without them.

packed      1 - tokens / (packs * budget), for text and for images
least       the same for packs without a gap: data with much text for their pictures, or little, fill one budget only
padded      the same samples in batches of one row each, filled up to the longest

Nothing is computed for what stays empty of a budget: a packed row is as long as its tokens are many.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from casa.training.packs.knapsack import Packer, Sized
from casa.training.packs.settings import PackingSettings


@dataclass(frozen=True)
class Efficiency:
    """packs: how many. samples: in them. text_waste, image_waste: shares of the budgets that stayed empty; least_text,
    least_image: what no packer could have filled, given these samples' tokens.

    choice: samples that there were to choose from, on average. longest_wait: packs that a sample waited for, at most.
    padded_waste: share of text tokens that are padding when the same samples stand in batches of as many rows as a
    pack holds samples.
    """

    packs: int
    samples: int
    text_waste: float
    image_waste: float
    least_text: float
    least_image: float
    choice: float
    longest_wait: int
    padded_waste: float

    @property
    def gaps(self) -> float:
        """Share of the budget that these samples run out of, whichever it is, that stayed empty: the packer's part."""
        return min(self.text_waste, self.image_waste)

    def __str__(self) -> str:
        return (
            f"{self.samples} samples in {self.packs} packs; empty: {self.text_waste:.1%} of the text budget "
            f"({self.least_text:.1%} at least), {self.image_waste:.1%} of the image budget ({self.least_image:.1%} at "
            f"least); {self.choice:.0f} samples to choose from; longest wait {self.longest_wait} packs; padded batches "
            f"of the same samples waste {self.padded_waste:.1%}"
        )


def measure_packing(samples: Iterable[Sized], settings: PackingSettings) -> Efficiency:
    """Packs samples as a run without end would, with the buffer that its reader has: full at so many samples, or bytes.

    The packs that empty the buffer at the end are left out.
    """
    packer: Packer = Packer(settings.budget, settings.buffer, settings.patience, settings.buffer_bytes)
    packs: list[list[Sized]] = []
    since: dict[int, int] = {}
    longest = waited = 0
    for sample in samples:
        packer.add(sample)
        since[id(sample)] = packer.packs
        while packer.is_full:
            waited += len(packer)
            pack = packer.pack()
            longest = max(longest, *(packer.packs - 1 - since[id(item)] for item in pack))
            packs.append(pack)
    packed = [item for pack in packs for item in pack]
    number, budget = max(1, len(packs)), settings.budget
    text = sum(item.text_tokens for item in packed) / budget.text
    image = sum(item.image_tokens for item in packed) / budget.image
    whole = max(text, image) or 1.0  # packs without a gap
    return Efficiency(
        packs=len(packs),
        samples=len(packed),
        text_waste=1 - text / number,
        image_waste=1 - image / number,
        least_text=1 - text / whole,
        least_image=1 - image / whole,
        choice=waited / number,
        longest_wait=longest,
        padded_waste=_padded_waste(packed, max(1, round(len(packed) / number))),
    )


def _padded_waste(items: Sequence[Sized], rows: int) -> float:
    padded = real = 0
    for start in range(0, len(items) - rows + 1, rows):
        lengths = [item.text_tokens for item in items[start : start + rows]]
        padded += rows * max(lengths)
        real += sum(lengths)
    return 1 - real / padded if padded else 0.0
