"""All that is asked of casa-smol, by name: pictures with questions, drawn by seed, to train on and held out.

    from projects.casa_smol.tasks import TASKS, asked
    for one in asked("receipt", "held_out", seed=7, count=100):
        one.picture, one.turns          # turns: question, answers

Tasks drawn by the browser need Chromium and playwright, drawings and easy_vqa their packages (`fetch drawings`,
`fetch weights`). Films have a shape of their own: `films.film`.
"""

import zlib
from collections.abc import Iterator
from itertools import islice

import numpy as np

from projects.casa_smol.damage import worn
from projects.casa_smol.tasks.asked import Asked, Turn
from projects.casa_smol.tasks.charts import chart
from projects.casa_smol.tasks.documents import DOCUMENTS
from projects.casa_smol.tasks.drawings import drawing, easy_vqa
from projects.casa_smol.tasks.html import Browser
from projects.casa_smol.tasks.lines import line, page
from projects.casa_smol.tasks.screens import SCREENS

PAINTED = {"line": line, "page": page, "chart": chart}
BROWSED = DOCUMENTS | SCREENS | {"drawing": drawing}
TASKS = (*PAINTED, *BROWSED, "easy_vqa")
SPLITS = ("train", "held_out")
SHEET = 24  # documents that the browser draws at once
WEAR = {"drawing": 0.5, "dialog": 0.4, "login": 0.4, "settings": 0.4, "window": 0.4, "terminal": 0.4}


def asked(
    task: str, split: str, seed: int, count: int, start: int = 0, browser: Browser | None = None
) -> Iterator[Asked]:
    """Pictures number `start` to `start + count` of a task, the same for the same seed.

    browser: one that is running already, for tasks that need it; started for the call if left out.
    """
    seeds = [(seed, zlib.crc32(task.encode()), SPLITS.index(split), number) for number in range(start, start + count)]
    if task in PAINTED:
        for one in seeds:
            picture, turns = PAINTED[task](np.random.default_rng(one), split)
            yield Asked(task, split, one, picture, turns)
    elif task == "easy_vqa":
        for one, (picture, turns) in zip(seeds, islice(easy_vqa(split), start, start + count), strict=False):
            yield Asked(task, split, one, picture, turns)
    elif browser is None:
        with Browser() as started:
            yield from asked(task, split, seed, count, start, started)
    else:
        for first in range(0, count, SHEET):
            sheet = seeds[first : first + SHEET]
            drawn = [BROWSED[task](np.random.default_rng(one), split) for one in sheet]
            pictures = browser.draw([html for html, _ in drawn])
            for one, picture, (_, turns) in zip(sheet, pictures, drawn, strict=True):
                yield Asked(
                    task, split, one, worn(picture, np.random.default_rng((*one, 1)), WEAR.get(task, 0.8)), turns
                )


__all__ = ["PAINTED", "SPLITS", "TASKS", "Asked", "Browser", "Turn", "asked"]
