"""Where images cut packed text into windows: the one definition of what a text token may look at.

Shapes: T = num_text, Q = num_query, N = num_image (tokens), W = num_windows.
Text tokens of all samples are packed in order, and so are image tokens; every index here counts in
those two packed streams unless it says otherwise. Tensors are made once, on the CPU, on first use.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, wraps
from itertools import accumulate
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

from casa.errors import UserError

SPLITS = ("image", "sample")

Built = TypeVar("Built")


def _lasting(build: Callable[[Any], Tensor]) -> "cached_property[Tensor]":
    """A tensor made once, and outside inference mode: one made inside could not serve a later backward."""

    @wraps(build)
    def outside(self: Any) -> Tensor:
        with torch.inference_mode(False):
            return build(self)

    return cached_property(outside)


@dataclass(frozen=True)
class ImageSpan:
    """One image: tokens `start:stop` of the packed image stream, standing before text `text_position`."""

    start: int
    stop: int
    text_position: int


@dataclass(frozen=True)
class Window:
    """A stretch of one sample's text, and the images that stand in it (in order, side by side in memory).

    Text `text_start:query_start` has keys only; text `query_start:text_stop` has queries too.
    """

    sample: int
    text_start: int
    text_stop: int
    query_start: int
    images: tuple[ImageSpan, ...]
    image_start: int
    image_stop: int

    @property
    def num_text(self) -> int:
        return self.text_stop - self.text_start

    @property
    def num_query(self) -> int:
        return self.text_stop - self.query_start

    @property
    def num_image(self) -> int:
        return self.image_stop - self.image_start


@dataclass(frozen=True)
class WindowLayout:
    """Samples packed in order, cut into windows by their images (paper, "Windows"; Fig. 1).

    Text t sees text s iff they share a window and s <= t. It sees an image iff the image is in a visible
    window (its own, or one of the `history` windows before it in the same sample) and stands at or
    before t. `from_insertions(text_lengths=[5], insertions=[[(1, 2), (3, 1)]])` has three windows, a
    text without image and then two images of two tokens and one; `mask()` is

                A A B   t0 t1 t2 t3 t4
        t0      . . .    #  .  .  .  .      window 0: text before the first image
        t1      # # .    .  #  .  .  .      window 1: image A stands before t1
        t2      # # .    .  #  #  .  .
        t3      . . #    .  .  .  #  .      window 2: image B stands before t3
        t4      . . #    .  .  .  #  #

    With `history=1`, t3 and t4 also see A. With `split="sample"` all text is one window, t0 sees no image,
    t1 and t2 see A, and t3 and t4 see A and B.

    With `past=[2]` the first two tokens of the sample are keys only, their queries having been answered by an
    earlier call: the mask keeps all columns and loses the rows t0 and t1.

    Instances are immutable and compare by what they were built from. Make them with `from_insertions`.
    """

    text_lengths: tuple[int, ...]
    insertions: tuple[tuple[tuple[int, int], ...], ...]
    split: str = "image"
    history: int = 0
    past: tuple[int, ...] | None = None

    @classmethod
    def from_insertions(
        cls,
        text_lengths: Sequence[int],
        insertions: Sequence[Sequence[tuple[int, int]]],
        split: str = "image",
        history: int = 0,
        past: Sequence[int] | None = None,
    ) -> "WindowLayout":
        """Makes the layout of samples whose images stand at known places.

        Args:
            text_lengths: Text tokens of each sample.
            insertions: For each sample, (text position, number of image tokens) of each image, in order. The
                position counts in the sample's own text, 0..length; at `length` an image stands after all text.
            split: "image" lets every run of images with no text between them open a window; "sample" makes each
                sample one window.
            history: How many earlier windows of the sample keep their images visible; -1 for all.
            past: For each sample, how many of its first text tokens have no query.

        Returns:
            The layout.

        Raises:
            UserError: Something is out of range or out of order, or an image has no tokens.
        """
        lengths = tuple(index(length) for length in text_lengths)
        places = tuple(tuple((index(p), index(n)) for p, n in sample) for sample in insertions)
        gone = None if past is None else tuple(index(p) for p in past)
        return cls(lengths, places, split, index(history), gone)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            near = get_close_matches(str(self.split), SPLITS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"split is {self.split!r}, but must be 'image' or 'sample'{hint}")
        if self.history < -1:
            raise UserError(f"history is {self.history}; give a number of windows, or -1 for all of them.")
        if len(self.insertions) != len(self.text_lengths):
            raise UserError(
                f"there are {len(self.text_lengths)} text_lengths but {len(self.insertions)} insertions; "
                "give one list per sample, an empty one for a sample without images."
            )
        for sample, (length, places) in enumerate(zip(self.text_lengths, self.insertions, strict=True)):
            _check_sample(sample, length, places)
        if self.past is not None:
            if len(self.past) != len(self.text_lengths):
                raise UserError(f"past has {len(self.past)} entries for {len(self.text_lengths)} samples.")
            for sample, (gone, length) in enumerate(zip(self.past, self.text_lengths, strict=True)):
                if not 0 <= gone <= length:
                    raise UserError(f"past of sample {sample} is {gone}, but must lie in 0..{length}, its text length.")

    @cached_property
    def num_text(self) -> int:
        return sum(self.text_lengths)

    @cached_property
    def num_query(self) -> int:
        return self.num_text - sum(self.past or ())

    @cached_property
    def num_image(self) -> int:
        return sum(tokens for sample in self.insertions for _, tokens in sample)

    @property
    def num_windows(self) -> int:
        return len(self.windows)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """All windows in packed order. A sample without text and images has none."""
        found: list[Window] = []
        text = image = 0
        for sample, (length, places) in enumerate(zip(self.text_lengths, self.insertions, strict=True)):
            query = text + (self.past[sample] if self.past is not None else 0)
            spans = []
            for position, tokens in places:
                spans.append(ImageSpan(image, image + tokens, text + position))
                image += tokens
            first = spans[0].start if spans else image
            found += _cut(sample, text, text + length, query, spans, first, self.split)
            text += length
        return tuple(found)

    def visible_windows(self, window: int) -> range:
        """Ids of the windows whose images text in `window` may see, oldest first, itself last."""
        return range(self._oldest_visible[window], window + 1)

    @_lasting
    def first_visible(self) -> Tensor:
        """int64 (W,): the first of each window's `visible_windows`."""
        return _long(self._oldest_visible)

    @cached_property
    def _oldest_visible(self) -> tuple[int, ...]:
        first: list[int] = []
        opening = 0
        for number, window in enumerate(self.windows):
            if number and self.windows[number - 1].sample != window.sample:
                opening = number
            first.append(opening if self.history == -1 else max(opening, number - self.history))
        return tuple(first)

    @cached_property
    def images(self) -> tuple[ImageSpan, ...]:
        """All images in packed order."""
        return tuple(image for window in self.windows for image in window.images)

    @_lasting
    def text_window(self) -> Tensor:
        """int64 (T,): the window each text token is in."""
        return _repeat(range(self.num_windows), [w.num_text for w in self.windows])

    @_lasting
    def image_window(self) -> Tensor:
        """int64 (N,): the window each image token is in."""
        return _repeat(range(self.num_windows), [w.num_image for w in self.windows])

    @_lasting
    def text_position(self) -> Tensor:
        """int64 (T,): 0, 1, 2, ... from the start of the token's window."""
        starts = _repeat((w.text_start for w in self.windows), [w.num_text for w in self.windows])
        return torch.arange(self.num_text) - starts

    @_lasting
    def image_text_index(self) -> Tensor:
        """int64 (N,): packed index of the text token before which the token's image stands."""
        return _repeat((i.text_position for i in self.images), [i.stop - i.start for i in self.images])

    @_lasting
    def image_position(self) -> Tensor:
        """int64 (N,): `text_position` of the next text token of the window, the same for a whole image."""
        positions = (i.text_position - w.text_start for w in self.windows for i in w.images)
        return _repeat(positions, [i.stop - i.start for i in self.images])

    @_lasting
    def query_index(self) -> Tensor:
        """int64 (Q,): the packed text index of each query."""
        ends = list(accumulate(self.text_lengths))
        counts = [n - p for n, p in zip(self.text_lengths, self.past or [0] * len(ends), strict=True)]
        last = list(accumulate(counts))
        return torch.arange(self.num_query) + _repeat((e - q for e, q in zip(ends, last, strict=True)), counts)

    @_lasting
    def sees_image(self) -> Tensor:
        """bool (Q,): whether the query sees at least one image."""
        opens = []
        for number in range(self.num_windows):
            visible = (i for w in self.visible_windows(number) for i in self.windows[w].images)
            earliest = next(visible, None)
            opens.append(self.num_text if earliest is None else earliest.text_position)
        # images are in order, so a query sees some image iff it sees the earliest
        earliest = _repeat(opens, [w.num_query for w in self.windows])
        return self.query_index >= earliest

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """bool (Q, N + T), image columns first: True where the query sees the key. Q = T without `past`."""
        query = self.on(device, "query_index")[:, None]
        text_window, image_window = self.on(device, "text_window"), self.on(device, "image_window")
        window = text_window[query]
        first = self.on(device, "first_visible")[window]
        image = (image_window >= first) & (image_window <= window)
        image &= self.on(device, "image_text_index") <= query
        text = (text_window == window) & (torch.arange(self.num_text, device=device) <= query)
        return torch.cat([image, text], dim=1)

    def on(self, device: torch.device | str, name: str) -> Tensor:
        """Returns the tensor attribute `name` on a device, copied there once for this layout."""
        tensor = getattr(self, name)
        device = torch.device(device)
        return tensor if device == tensor.device else self.cached((name, device), lambda: tensor.to(device))

    def cached(self, key: Hashable, build: Callable[[], Built]) -> Built:
        """Returns what `build` makes, made once for this layout: plans and index tensors that all layers share.

        Like the layout's own tensors, it is made outside inference mode.
        """
        if key not in self._cache:
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = build()
        return self._cache[key]

    @cached_property
    def _cache(self) -> dict[Hashable, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # what is derived is made again where it is needed: copies and pickles carry only the definition
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def _check_sample(sample: int, length: int, places: tuple[tuple[int, int], ...]) -> None:
    if length < 0:
        raise UserError(f"text length of sample {sample} is {length}; it must be 0 or more.")
    before = 0
    for number, (position, tokens) in enumerate(places):
        name = f"image {number} of sample {sample}"
        if not 0 <= position <= length:
            raise UserError(f"{name} stands at {position}, out of range 0..{length}, the sample's text.")
        if position < before:
            raise UserError(f"{name} stands at {position}, out of order after one at {before}; sort by position.")
        if tokens < 1:
            raise UserError(f"{name} has {tokens} tokens; leave out images that have none.")
        before = position


def _cut(
    sample: int, start: int, stop: int, query: int, spans: list[ImageSpan], image: int, split: str
) -> list[Window]:
    """The windows of one sample: packed text `start:stop`, images `spans`, first image token `image`."""
    if split == "sample":
        borders = [start] if spans or stop > start else []
    else:
        borders = sorted({span.text_position for span in spans})
        if stop > start and (not borders or borders[0] > start):
            borders.insert(0, start)
    windows = []
    left = list(spans)
    for opens, closes in zip(borders, [*borders[1:], stop], strict=False):
        if split == "sample":
            mine, left = left, []
        else:
            mine = [span for span in left if span.text_position == opens]
            left = left[len(mine) :]
        end = mine[-1].stop if mine else image
        windows.append(Window(sample, opens, closes, min(max(opens, query), closes), tuple(mine), image, end))
        image = end
    return windows


def _long(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _repeat(values: Iterable[int], counts: Sequence[int]) -> Tensor:
    return _long(values).repeat_interleave(_long(counts))
