"""The tasks as files that `casa train` reads: tars of pictures and chats, in shards, by seed.

    python -m projects.casa_smol.data data/casa-smol --pictures 20000
    python -m projects.casa_smol.data data/casa-smol-held-out --pictures 400 --split held_out --seed 2026

Shares of the tasks are in SHARES; of every hundred pictures there is a film beside them, in shards of their own. A
shard appears whole; a command that was broken off goes on with the next one, so it may run beside other work, and more
pictures may be asked for later.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casa.data.made import write_clips, write_pictures
from projects.casa_smol.tasks import BROWSED, SPLITS, Asked, Browser, asked
from projects.casa_smol.tasks.films import FPS, PROMPT, Film, film

# of every hundred pictures; lines first, since reading is what everything else stands on
SHARES = {
    "line": 26, "page": 16, "receipt": 10, "invoice": 6, "form": 6, "table": 6, "chart": 10, "dialog": 3, "login": 2,
    "settings": 2, "window": 3, "terminal": 2, "drawing": 5, "easy_vqa": 3,
}  # fmt: skip
SHARD = 240
MOST_TURNS = 6
FILMS, FILM_SHARD, SECONDS = 0.01, 24, 6.0  # a picture; seconds: frames of the largest fill a pack, and none is shrunk


def write(folder: Path, split: str, seed: int, pictures: int, shares: dict[str, int] | None = None) -> Iterator[Path]:
    """Writes what is missing of so many pictures, and yields each new shard. Tasks go in turn, so all grow alike."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = shares or SHARES
    whole = sum(shares.values())
    wanted = {task: -(-pictures * share // whole) for task, share in shares.items()}
    missing = [
        (start / count, task, start, min(SHARD, count - start))
        for task, count in wanted.items()
        for start in range(0, count, SHARD)
        if not shard_at(folder, task, start).exists()
    ]
    browser = Browser() if any(task in BROWSED for _, task, _, _ in missing) else None
    if browser is not None:
        browser.__enter__()
    try:
        for _, task, start, count in sorted(missing):
            drawn = asked(task, split, seed, count, start, browser)
            path = shard_at(folder, task, start)
            write_pictures(path, _Next(drawn), count, (seed, start), turns=MOST_TURNS)
            yield path
    finally:
        if browser is not None:
            browser.__exit__(None, None, None)


def shard_at(folder: Path, task: str, start: int, size: int | None = None) -> Path:
    """File of the shard whose first picture has that number."""
    return folder / f"{task}-{start // (size or SHARD):04}.tar"


class _Next:
    """A source for casa's writer: the next picture of those that are drawn in sheets."""

    def __init__(self, drawn: Iterator[Asked]) -> None:
        self._drawn = drawn

    def __call__(self, rng: Any, size: Any) -> Asked:
        return next(self._drawn)


@dataclass(frozen=True)
class Clip:
    """A film as casa's writer of clips takes it."""

    film: Film

    @property
    def width(self) -> int:
        return self.film.frames[0].width

    @property
    def height(self) -> int:
        return self.film.frames[0].height

    def frames(self) -> tuple[Image.Image, ...]:
        return self.film.frames

    def captions(self) -> tuple[str, ...]:
        return self.film.said


def write_films(folder: Path, split: str, seed: int, count: int) -> Iterator[Path]:
    """Writes what is missing of so many films, as video with what is said when beside it, and yields each new shard."""
    folder.mkdir(parents=True, exist_ok=True)

    def drawn(rng: np.random.Generator) -> Clip:
        return Clip(film(tuple(rng.integers(2**31, size=2).tolist()), split, SECONDS))

    for start in range(0, count, FILM_SHARD):
        path = shard_at(folder, "film", start, FILM_SHARD).with_suffix(".jsonl")
        if not path.exists():
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # of a shard that was broken off
            which = (seed, SPLITS.index(split), start)
            write_clips(path, drawn, min(FILM_SHARD, count - start), which, prompt=PROMPT, fps=FPS)
            yield path


def main(arguments: list[str]) -> int:
    """Writes shards."""
    parser = argparse.ArgumentParser(description="Draws casa-smol's data into tars that casa train reads.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    films = write_films(given.out, given.split, given.seed, round(given.pictures * FILMS))
    for path in chain(films, write(given.out, given.split, given.seed, given.pictures)):
        print(path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
