"""Lengths of samples as the data of each stage have them, without the data: what packing is measured on.

    image    most show one picture, from thumbnails to pages; some are text alone, some show several
    video    about 32 frames, a question and its answer
    live     half a minute to four minutes at two frames a second, a few words behind each frame

They are assumptions, since no data were at hand to be counted, and nothing in them is fitted to a budget, but for
`spread_lengths`, which is in a budget's own proportion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from casa.training.samples import BUDGETS, Budget

FRAME_TOKENS = 256  # of a frame of 448 x 448 px, as large as the recipes for video take it
FRAME_BYTES = 400_000  # of such a frame while it waits: a lightly packed PNG, two bytes a pixel
FRAME_TEXT = 2  # delimiters around a frame
LIVE_FRAMES = (60, 480)  # fewest and most


@dataclass(frozen=True)
class Length:
    """A sample of which only the lengths are known. held_bytes: of the pictures that it holds while it waits."""

    text_tokens: int
    image_tokens: int
    held_bytes: int = 0


def spread_lengths(
    count: int, budget: Budget, seed: int = 0, images: float = 640.0, spread: float = 0.7
) -> list[Length]:
    """Samples of one picture: log-normal, from thumbnails and one-word answers to pages and essays.

    images: median image tokens of a sample. spread: deviation of the logarithms. Text and image tokens are in the
    proportion of the budget, less a twelfth of the text: image tokens are what a pack runs out of.
    """
    generator = np.random.default_rng(seed)
    factor = math.exp(spread**2 / 2)
    image = generator.lognormal(math.log(images), spread, count)
    mean_text = 0.92 * images * factor * budget.text / budget.image
    text = generator.lognormal(math.log(mean_text / factor), spread, count)
    return [_within(budget, t, max(1.0, i)) for t, i in zip(text, image, strict=True)]


def stage_lengths(stage: str, count: int, seed: int = 0) -> list[Length]:
    """`count` samples or a few more, within the budget of a stage of the paper: "image", "video" or "live"."""
    generator = np.random.default_rng(seed)
    draw = {"image": _image, "video": _video, "live": _live}[stage]
    found: list[Length] = []
    while len(found) < count:
        found += draw(generator, BUDGETS[stage])
    return found


def _image(generator: np.random.Generator, budget: Budget) -> Iterator[Length]:
    """One in ten is text alone, one in ten shows two to six pictures."""
    pictures = int(generator.choice([0, 1, int(generator.integers(2, 7))], p=[0.1, 0.8, 0.1]))
    image = generator.lognormal(math.log(640), 0.7, pictures).sum()
    text = generator.lognormal(math.log(60 if pictures else 300), 0.7)
    yield _within(budget, text, image)


def _video(generator: np.random.Generator, budget: Budget) -> Iterator[Length]:
    frames = int(np.clip(generator.lognormal(math.log(32), 0.7), 1, budget.image // FRAME_TOKENS))
    text = generator.lognormal(math.log(100), 0.7) + FRAME_TEXT * frames
    yield _within(budget, text, frames * FRAME_TOKENS, frames * FRAME_BYTES)


def _live(generator: np.random.Generator, budget: Budget) -> Iterator[Length]:
    """The pieces of a record, which is cut where a pack is full (`oversize.images: split`)."""
    frames = int(generator.integers(LIVE_FRAMES[0], LIVE_FRAMES[1] + 1))
    said = 1 + generator.lognormal(math.log(1.6), 0.4)  # tokens a frame: the stop token, and words
    most = budget.image // FRAME_TOKENS
    while frames:
        piece = min(frames, most)
        yield _within(budget, 30 + (FRAME_TEXT + said) * piece, piece * FRAME_TOKENS, piece * FRAME_BYTES)
        frames -= piece


def _within(budget: Budget, text: float, image: float, held_bytes: int = 0) -> Length:
    return Length(int(min(max(2, text), budget.text)), int(min(max(0, image), budget.image)), held_bytes)
