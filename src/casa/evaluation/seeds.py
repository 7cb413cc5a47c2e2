"""Random generators of the tasks: one per task, split and seed, never shared between training and evaluation.

The split is part of the entropy, so no seed of the training split can give the pictures of any seed of the
held-out split, whatever integers are chosen.
"""

import numpy as np

from casa.evaluation.example import Split

_TASKS = {"pages": 1, "scenes": 2, "stream": 3, "sheets": 4}
_SPLITS = {"train": 101, "held_out": 202}


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is "train" or "held_out"."""
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; choose 'train' or 'held_out'.")


def generator(task: str, split: Split, seed: int, *more: int) -> np.random.Generator:
    """The generator of one example: any integer `seed`; `more` are non-negative sub-streams of it."""
    check_split(split)
    whole = 2 * seed if seed >= 0 else -2 * seed - 1
    return np.random.default_rng(np.random.SeedSequence([_TASKS[task], _SPLITS[split], whole, *more]))


def as_generator(task: str, split: Split, seed: int | np.random.Generator) -> np.random.Generator:
    """`seed` itself if it is a generator (training draws page after page from one), else a new one."""
    check_split(split)
    return seed if isinstance(seed, np.random.Generator) else generator(task, split, int(seed))
