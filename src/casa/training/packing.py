"""Samples into packs: a greedy knapsack over two budgets at once, from a buffer in which no sample waits for ever.

    buffer, oldest first    a   b   c   d   e   f ...
    pack                    a                           the oldest always goes
                            a + d                       then the one that points most nearly where room is left
                            a + d + f + ...             until none fits
    instead, perhaps        a + b + e                   if much of both budgets is left: the fullest of the packs
                                                        that begin with the oldest and one of the next
    before, perhaps         c                           which is a full pack alone, and would only take up the buffer

All packs but those full ones take the oldest sample, and so do all once it has waited for `patience` packs: one with k
others before it waits for at most k + `patience`. Those that have waited for as long are taken, oldest first, before
all others that fit.

`measure_packing` tells how well packs are filled, on the lengths of samples as each stage of the paper has them. These
are assumptions, since no data were at hand to be counted:

    image    most show one picture, from thumbnails to pages; some are text alone, some show several
    video    about 32 frames, a question and its answer
    live     half a minute to four minutes at two frames a second, a few words behind each frame
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from casa.training.config import BUDGETS, PackingSettings, TokenBudget

ENOUGH = 0.99  # of either budget: a pack as full as this is not improved on, or added to
TRIES = 64  # how many of the next oldest, at most
FRAME_TOKENS = 256  # of a frame of 448 x 448 px, as large as the recipes for video take it
FRAME_BYTES = 400_000  # of such a frame while it waits: a lightly packed PNG, two bytes a pixel
FRAME_TEXT = 2  # delimiters around a frame


class Packable(Protocol):
    """What can be packed. held_bytes: memory that it takes while it waits, beside its tokens."""

    @property
    def text_tokens(self) -> int: ...

    @property
    def image_tokens(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...


Item = TypeVar("Item", bound=Packable)


class Packer(Generic[Item]):
    """Fills packs. The same items in the same order give the same packs.

    Args:
        buffer_size: items that may wait.
        patience: packs after which an item goes first.
        max_bytes: that waiting items may hold; the buffer is full there even if it has fewer.

    Attributes:
        packs: how many were made.
    """

    def __init__(
        self, budget: TokenBudget, buffer_size: int = 256, patience: int = 16, max_bytes: float = math.inf
    ) -> None:
        self.budget, self.buffer_size, self.patience, self.max_bytes = budget, buffer_size, patience, max_bytes
        self.packs = 0
        self._waiting: list[tuple[Item, int]] = []  # with the number of packs when it came, oldest first
        self._held = 0  # bytes

    @classmethod
    def from_settings(cls, settings: PackingSettings) -> "Packer[Item]":
        """The packer of a run."""
        return cls(settings.budget, settings.buffer_size, settings.patience, settings.buffer_mb * 2**20)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether a pack should be made before more is added."""
        return len(self._waiting) >= self.buffer_size or self._held >= self.max_bytes

    @property
    def waiting(self) -> list[Item]:
        """Those that wait, oldest first."""
        return [item for item, _ in self._waiting]

    def add(self, item: Item) -> None:
        """Raises ValueError for an item that no pack can hold."""
        if not self.budget.holds(item.text_tokens, item.image_tokens):
            raise ValueError(
                f"{item.text_tokens} text and {item.image_tokens} image tokens are more than {self.budget}."
            )
        self._waiting.append((item, self.packs))
        self._held += item.held_bytes

    def pack(self) -> list[Item]:
        """The next pack, in the order of arrival; empty only if none waits."""
        if not self._waiting:
            return []
        sizes = np.array([(item.text_tokens, item.image_tokens) for item, _ in self._waiting], dtype=np.float64)
        sizes /= (self.budget.text, self.budget.image)
        taken = self._choose(sizes)
        chosen = [item for (item, _), goes in zip(self._waiting, taken, strict=True) if goes]
        self._waiting = [entry for entry, goes in zip(self._waiting, taken, strict=True) if not goes]
        self._held -= sum(item.held_bytes for item in chosen)
        self.packs += 1
        return chosen

    def _choose(self, sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of those that wait go. sizes: (n, 2), in shares of the budgets."""
        full = sizes.max(axis=1) >= ENOUGH
        if full.any() and self.packs - self._waiting[0][1] < self.patience:
            # pieces of long videos, which hold most bytes of the buffer
            return np.arange(len(sizes)) == full.argmax()
        # sums of sizes and budgets are compared as shares; half a token is above all rounding
        slack = 0.5 / max(self.budget.text, self.budget.image)
        free = np.ones(len(sizes), dtype=bool)
        room = np.ones(2)
        for index, (_, since) in enumerate(self._waiting):
            if index and self.packs - since < self.patience:
                break
            if (sizes[index] <= room + slack).all():
                free[index] = False
                room = room - sizes[index]
        filled, left = _fill(sizes, free[None], room[None], slack)
        # few large samples, as of videos, leave gaps that other choices would not
        if left.min() > 1.0 - ENOUGH:
            starts = np.flatnonzero(free & (sizes <= room + slack).all(axis=1))[:TRIES]
            each = np.repeat(free[None], len(starts), axis=0)
            each[np.arange(len(starts)), starts] = False
            filled, left = _fill(sizes, np.vstack([filled, each]), np.vstack([left, room - sizes[starts]]), slack)
        return ~filled[left.min(axis=1).argmin()]

    def state_dict(self) -> dict[str, Any]:
        """Packs made, and since which of them each waiting item waits; the items themselves are the caller's."""
        return {"packs": self.packs, "since": [since for _, since in self._waiting]}

    def load_state_dict(self, state: dict[str, Any], items: Iterable[Item]) -> None:
        """Goes on from `state_dict`, with the items that waited then."""
        self.packs = int(state["packs"])
        self._waiting = [(item, int(since)) for item, since in zip(items, state["since"], strict=True)]
        self._held = sum(item.held_bytes for item, _ in self._waiting)


def _fill(
    sizes: NDArray[np.float64], free: NDArray[np.bool_], room: NDArray[np.float64], slack: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Adds to c packs what fits into each, sample by sample: the largest share of what is left, on both axes together.

    Of equals, the oldest is added.

    Args:
        sizes: (n, 2), of n samples that wait, in shares of the budgets.
        free: (c, n), True for those that are not in a pack.
        room: (c, 2), shares of the budgets that are left.

    Returns:
        free and room, as they are then.
    """
    free, room = free.copy(), room.copy()
    while True:
        fits = free & (sizes <= room[:, None] + slack).all(axis=-1)
        rows = np.flatnonzero(fits.any(axis=1))
        if not len(rows):
            return free, room
        score = np.where(fits, np.maximum(room, 0.0) @ sizes.T, -1.0)
        chosen = score.argmax(axis=1)[rows]
        free[rows, chosen] = False
        room[rows] -= sizes[chosen]


@dataclass(frozen=True)
class PackingEfficiency:
    """How well packs are filled. Nothing is computed for what stays empty: a packed row is as long as its tokens.

    Attributes:
        packs: how many. samples: in them.
        text_waste, image_waste: shares of the budgets that stayed empty; least_text, least_image: what no packer could
            have filled, given these samples: data with much text for their pictures, or little, fill one budget only.
        choice: samples that there were to choose from, on average.
        longest_wait: packs that a sample waited for, at most.
        padded_waste: share of text tokens that are padding when the same samples stand in batches of as many rows as a
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

    @property
    def gaps(self) -> float:
        """Share of the budget that these samples run out of, whichever it is, that stayed empty: the packer's part."""
        return min(self.text_waste, self.image_waste)


def measure_packing(samples: Iterable[Packable], settings: PackingSettings) -> PackingEfficiency:
    """Packs samples as a run without end would; the packs that empty the buffer at the end are left out."""
    packer: Packer[Packable] = Packer.from_settings(settings)
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


@dataclass(frozen=True)
class SampleLength:
    """A sample of which only the lengths are known. held_bytes: of the pictures that it holds while it waits."""

    text_tokens: int
    image_tokens: int
    held_bytes: int = 0


def spread_lengths(
    count: int, budget: TokenBudget, seed: int = 0, images: float = 640.0, spread: float = 0.7
) -> list[SampleLength]:
    """Samples of one picture: log-normal, from thumbnails and one-word answers to pages and essays.

    Text and image tokens are in the proportion of the budget, less a twelfth of the text: image tokens are what a pack
    runs out of.

    Args:
        images: median image tokens of a sample.
        spread: deviation of the logarithms.
    """
    generator = np.random.default_rng(seed)
    factor = math.exp(spread**2 / 2)
    image = generator.lognormal(math.log(images), spread, count)
    mean_text = 0.92 * images * factor * budget.text / budget.image
    text = generator.lognormal(math.log(mean_text / factor), spread, count)
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
    image = generator.lognormal(math.log(640), 0.7, pictures).sum()
    text = generator.lognormal(math.log(60 if pictures else 300), 0.7)
    yield _within(budget, text, image)


def _video_lengths(generator: np.random.Generator, budget: TokenBudget) -> Iterator[SampleLength]:
    frames = int(np.clip(generator.lognormal(math.log(32), 0.7), 1, budget.image // FRAME_TOKENS))
    text = generator.lognormal(math.log(100), 0.7) + FRAME_TEXT * frames
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
