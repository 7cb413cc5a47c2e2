"""How full packs are, on lengths of samples as each stage of the paper has them.

These lengths are assumptions, since no data were at hand to be counted:

    image    most show one picture, from thumbnails to pages; some are text alone, some show several
    video    about 32 frames, a question and its answer
    live     half a minute to four minutes at two frames a second, a few words behind each frame
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from casa.training.config import BUDGETS, PackingSettings, TokenBudget
from casa.training.packed_dataset import Packable, Packer

FRAME_TOKENS = 256  # of a frame of 448 x 448 px, as large as the recipes for video take it
FRAME_BYTES = 400_000  # of such a frame while it waits: a lightly packed PNG, two bytes a pixel
FRAME_TEXT = 2  # delimiters around a frame
SPREAD = 0.7  # deviation of the logarithms of lengths


@dataclass(frozen=True)
class SampleLength:
    """A sample of which only the lengths are known. held_bytes: of the pictures that it holds while it waits."""

    text_tokens: int
    image_tokens: int
    held_bytes: int = 0


@dataclass(frozen=True)
class PackingEfficiency:
    """How well packs are filled. Nothing is computed for what stays empty: a packed row is as long as its tokens.

    Attributes:
        packs, samples: How many, and in them.
        text_waste, image_waste: Shares of the budgets that stayed empty.
        least_text, least_image: What no packer could have filled, given these samples: data with much text for their
            pictures, or little, fill one budget only.
        choice: Samples that there were to choose from, on average.
        longest_wait: Packs that a sample waited for, at most.
        padded_waste: Share of text tokens that are padding when the same samples stand in batches of as many rows as a
            pack holds samples, filled up to the longest.
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


def measure_packing(samples: Iterable[Packable], settings: PackingSettings) -> PackingEfficiency:
    """Packs samples as a run without end would; the packs that empty the buffer at the end are left out."""
    packer: Packer[Packable] = Packer(settings)
    packs: list[list[Packable]] = []
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
    without_gaps = max(text, image) or 1.0
    return PackingEfficiency(
        packs=len(packs),
        samples=len(packed),
        text_waste=1 - text / number,
        image_waste=1 - image / number,
        least_text=1 - text / without_gaps,
        least_image=1 - image / without_gaps,
        choice=waited / number,
        longest_wait=longest,
        padded_waste=_padded_waste(packed, max(1, round(len(packed) / number))),
    )


def _padded_waste(items: Sequence[Packable], rows: int) -> float:
    padded = real = 0
    for start in range(0, len(items) - rows + 1, rows):
        lengths = [item.text_tokens for item in items[start : start + rows]]
        padded += rows * max(lengths)
        real += sum(lengths)
    return 1 - real / padded if padded else 0.0


def spread_lengths(count: int, budget: TokenBudget, seed: int = 0, images: float = 640.0) -> list[SampleLength]:
    """Samples of one picture: log-normal, from thumbnails and one-word answers to pages and essays.

    Text and image tokens are in the proportion of the budget, less a twelfth of the text: image tokens are what a pack
    runs out of. images: median image tokens of a sample.
    """
    generator = np.random.default_rng(seed)
    image = generator.lognormal(math.log(images), SPREAD, count)
    text = generator.lognormal(math.log(0.92 * images * budget.text / budget.image), SPREAD, count)
    return [_within(budget, t, max(1.0, i)) for t, i in zip(text, image, strict=True)]


def stage_lengths(stage: str, count: int, seed: int = 0) -> list[SampleLength]:
    """`count` samples or a few more, within the budget of a stage of the paper: "image", "video" or "live"."""
    generator = np.random.default_rng(seed)
    draw = {"image": _image_lengths, "video": _video_lengths, "live": _live_lengths}[stage]
    found: list[SampleLength] = []
    while len(found) < count:
        found += draw(generator, BUDGETS[stage])
    return found


def _image_lengths(generator: np.random.Generator, budget: TokenBudget) -> Iterator[SampleLength]:
    """One in ten is text alone, one in ten shows two to six pictures."""
    pictures = int(generator.choice([0, 1, int(generator.integers(2, 7))], p=[0.1, 0.8, 0.1]))
    image = generator.lognormal(math.log(640), SPREAD, pictures).sum()
    text = generator.lognormal(math.log(60 if pictures else 300), SPREAD)
    yield _within(budget, text, image)


def _video_lengths(generator: np.random.Generator, budget: TokenBudget) -> Iterator[SampleLength]:
    frames = int(np.clip(generator.lognormal(math.log(32), SPREAD), 1, budget.image // FRAME_TOKENS))
    text = generator.lognormal(math.log(100), SPREAD) + FRAME_TEXT * frames
    yield _within(budget, text, frames * FRAME_TOKENS, frames * FRAME_BYTES)


def _live_lengths(generator: np.random.Generator, budget: TokenBudget) -> Iterator[SampleLength]:
    """The pieces of a record of 60 to 480 frames, which is cut where a pack is full (`oversize.images: split`)."""
    frames = int(generator.integers(60, 481))
    said = 1 + generator.lognormal(math.log(1.6), 0.4)  # tokens a frame: the stop token, and words
    while frames:
        piece = min(frames, budget.image // FRAME_TOKENS)
        yield _within(budget, 30 + (FRAME_TEXT + said) * piece, piece * FRAME_TOKENS, piece * FRAME_BYTES)
        frames -= piece


def _within(budget: TokenBudget, text: float, image: float, held_bytes: int = 0) -> SampleLength:
    return SampleLength(int(min(max(2, text), budget.text)), int(min(max(0, image), budget.image)), held_bytes)
