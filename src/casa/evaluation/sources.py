"""Training examples of the offline tasks, by name: what `casa train` hands to the trainer.

Only the "train" split is drawn from: scans below index 1400 and the photographs that are not held out. Pages are
drawn with anything from faithful to strongly bent handwriting, so that new writers are less of a surprise.
Every source is a function of a generator and a size (height, width) in px, or None for a size of its own choice;
they are module-level functions, so that worker processes can call them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from casa.evaluation.example import DENSE_CHANNELS, NO_DIGIT, Example
from casa.evaluation.pages import page
from casa.evaluation.scenes import scene
from casa.evaluation.stream import StreamExample, stream

Size = tuple[int, int] | None
Source = Callable[[np.random.Generator, Size], Any]

LARGEST_SCENE = 448
FRAME_SIDES = (224, 448)
MANY = 16  # questions on one picture; a training step asks some of them

EMPTY: Mapping[str, int] = {name: NO_DIGIT if name == "digit" else 0 for name in DENSE_CHANNELS}
"""The class of each dense channel that says nothing is there."""


def pages(rng: np.random.Generator, size: Size = None) -> Example:
    """A page of handwriting with many questions."""
    return page(rng, "train", turns=MANY, strength=float(rng.random()), sizes=None if size is None else [size])


def scenes(rng: np.random.Generator, size: Size = None) -> Example:
    """Shapes over a photograph with many questions, at most 448 px a side."""
    if size is not None:
        size = (min(size[0], LARGEST_SCENE), min(size[1], LARGEST_SCENE))
    return scene(rng, "train", turns=MANY - 2, sizes=None if size is None else [size])


def frames(rng: np.random.Generator, size: Size = None) -> Example:
    """One frame of a stream; a page where the size is none that streams have."""
    least, most = FRAME_SIDES
    if size is not None and (min(size) < least or max(size) > most):
        return page(rng, "train", turns=0, sizes=[size])
    clip = stream(rng, "train", seconds=2.0, sizes=None if size is None else [size])
    time = float(rng.choice(clip.times()))
    return Example(image=clip.frame(time), turns=(), dense=clip.dense(time))


def clips(rng: np.random.Generator, size: Size = None) -> StreamExample:
    """A stream of 6-12 frames, now and then of up to 40, with a caption or silence for each."""
    count = int(rng.integers(6, 13)) if rng.random() < 0.8 else int(rng.integers(13, 41))
    if size is None:
        largest = 12 if count <= 12 else 9
        height, width = (int(cells) * 28 for cells in rng.integers(8, largest + 1, 2))
        size = (height, width)
    return stream(rng, "train", seconds=count / 2, sizes=[size], strength=float(rng.random()))


SOURCES: Mapping[str, Source] = {"pages": pages, "scenes": scenes, "frames": frames, "clips": clips}
