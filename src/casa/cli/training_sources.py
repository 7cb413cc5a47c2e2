"""What `casa train` draws on: the offline tasks' training split, in the shape that casa.training asks for.

Everything is a function at module level, so that worker processes can be given it.
"""

import math
from collections.abc import Callable

import numpy as np

from casa.evaluation import DENSE_CHANNELS, Example, StreamExample, page, scene, sheet, stream
from casa.evaluation.example import CELL, NO_DIGIT
from casa.evaluation.scenes import MAX_SIDE as SCENE_SIDE
from casa.evaluation.scenes import MIN_SIDE as LEAST_SIDE
from casa.evaluation.stream import FPS, PROMPT
from casa.evaluation.stream import MAX_SIDE as STREAM_SIDE
from casa.evaluation.stream import MIN_SIDE as LEAST_STREAM_SIDE
from casa.training import Sources

_QUESTIONS = 16  # per picture; each step asks some of them
_SHORT, _LONG = (6, 12), (13, 40)  # frames of a clip, fewest and most


def pages(rng: np.random.Generator, size: tuple[int, int] | None) -> Example:
    """A page by writers of the training split, their strokes bent more or less."""
    return page(rng, "train", turns=_QUESTIONS, strength=_strength(rng), sizes=_only(size))


def sheets(rng: np.random.Generator, size: tuple[int, int] | None) -> Example:
    """Handwriting all over the picture: for the tower, with no questions."""
    return sheet(rng, "train", strength=_strength(rng), sizes=_only(size))


def scenes(rng: np.random.Generator, size: tuple[int, int] | None) -> Example:
    return scene(rng, "train", turns=_QUESTIONS, sizes=_only(size))


def frames(rng: np.random.Generator, size: tuple[int, int] | None) -> Example:
    """One frame of a stream, as a picture with dense targets and no questions."""
    shown = stream(rng, "train", seconds=2.0, strength=_strength(rng), sizes=_only(size))
    times = shown.times()
    t = times[int(rng.integers(len(times)))]
    return Example(image=shown.frame(t), turns=(), dense=shown.dense(t))


def clips(rng: np.random.Generator) -> StreamExample:
    """A stream of 3 to 20 s at 2 fps; most are short and small, as pictures are what costs."""
    return _clip(rng, _strength, 0.0)


def rough_pages(rng: np.random.Generator, size: tuple[int, int] | None) -> Example:
    """Pages whose strokes are bent until they are read about as well as those of writers never seen."""
    return page(rng, "train", turns=_QUESTIONS, strength=_rough(rng), sizes=_only(size))


def rough_clips(rng: np.random.Generator) -> StreamExample:
    """Streams in such strokes, in which a number is often the one before but for a digit."""
    return _clip(rng, _rough, 0.35)


def _clip(rng: np.random.Generator, strength: Callable[[np.random.Generator], float], kin: float) -> StreamExample:
    fewest, most = _SHORT if rng.random() < 0.8 else _LONG
    count = int(rng.integers(fewest, most + 1))
    low, high = LEAST_STREAM_SIDE, STREAM_SIDE if count <= _SHORT[1] else (LEAST_STREAM_SIDE + STREAM_SIDE) // 2
    sides = [CELL * math.floor(low / CELL * ((high + CELL) / low) ** rng.random()) for _ in range(2)]
    return stream(rng, "train", seconds=count / FPS, strength=strength(rng), sizes=[(sides[0], sides[1])], kin=kin)


def training_sources() -> Sources:
    """The sources that recipes name: pictures `pages`, `rough_pages`, `sheets`, `scenes`, `frames`, and `clips`,
    `rough_clips`."""
    return Sources(
        pictures={"pages": pages, "rough_pages": rough_pages, "sheets": sheets, "scenes": scenes, "frames": frames},
        clips={"clips": clips, "rough_clips": rough_clips},
        channels=DENSE_CHANNELS,
        empty={"digit": NO_DIGIT},
        sides={
            "pages": (LEAST_SIDE, 672),
            "rough_pages": (LEAST_SIDE, 672),
            "sheets": (LEAST_SIDE, 672),
            "scenes": (LEAST_SIDE, SCENE_SIDE),
            "frames": (LEAST_STREAM_SIDE, STREAM_SIDE),
        },
        prompt=PROMPT,
    )


def _strength(rng: np.random.Generator) -> float:
    # real writers differ from those of the training scans by more than the scans among themselves
    return 1.5 * float(rng.random())


def _rough(rng: np.random.Generator) -> float:
    return 0.4 + 1.6 * float(rng.random())


def _only(size: tuple[int, int] | None) -> list[tuple[int, int]] | None:
    return None if size is None else [size]
