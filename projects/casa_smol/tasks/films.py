"""Films in which text appears: slides, a terminal, signs that change. Two frames a second, and what is new in each.

    python -m projects.casa_smol.tasks.films screen.mp4 --kind terminal --seconds 60 --size 448 336      a held-out one

New lines come last, so a model is asked of each frame, by `PROMPT`, for the last line (`CasaProcessor.stream_prompt`).
Of a frame with nothing on it, it stops at once; where it says again what it said before, a session is silent.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from casa.media import VideoWriter
from projects.casa_smol.canvas import Canvas
from projects.casa_smol.damage import worn
from projects.casa_smol.pages import Brush, theme
from projects.casa_smol.tasks.asked import Seed
from projects.casa_smol.words import pick

FPS = 2.0
PROMPT = "Read the last line."
KINDS = ("slides", "terminal", "signs")


@dataclass(frozen=True)
class Film:
    """frames: pictures, FPS a second. said: for each frame the text that is new in it, "" for none."""

    split: str
    seed: Seed
    frames: tuple[Image.Image, ...]
    said: tuple[str, ...]


def film(
    seed: Seed, split: str, seconds: float = 12.0, kind: str | None = None, size: tuple[int, int] | None = None
) -> Film:
    """A film by its seed. kind: one of KINDS; any if left out. size: in px; 336 to 640 wide if left out."""
    rng = np.random.default_rng(seed)
    kind = pick(rng, KINDS) if kind is None else kind
    width = int(rng.integers(336, 641))
    drawn = (width, int(width * pick(rng, (0.5625, 0.75))))
    size = drawn if size is None else size
    frames, said = [], []
    shots = _shots(rng, split, str(kind), size)
    image, text, stay = next(shots)
    wear = int(rng.integers(2**31))
    for _ in range(round(seconds * FPS)):
        # the same wear on every frame but for the grain, as one camera has it
        frames.append(worn(image, np.random.default_rng(wear), 0.5))
        said.append(text)
        text, stay = "", stay - 1
        if stay <= 0:
            image, text, stay = next(shots)
    return Film(split, seed, tuple(frames), tuple(said))


def _shots(rng: Generator, split: str, kind: str, size: tuple[int, int]):
    """Pictures that follow each other without end, with their new text and how many frames they stay."""
    while True:
        colours = theme(rng)
        canvas = Canvas(size, colours.paper)
        brush = Brush(canvas, rng, split, colours)
        face, letters = brush.face(), brush.size(15, 30)
        ink, left, y = (
            brush.ink_on(colours.paper, 0.3),
            int(rng.integers(10, 40)),
            float(letters * rng.uniform(1.2, 2.0)),
        )
        if kind == "terminal":
            letters = min(letters, 20)
        if rng.random() < 0.5:
            yield canvas.image.copy(), "", int(rng.integers(1, 4))
        first = True
        while y < size[1] - letters * 0.4:
            at = round(letters * 1.4) if first and kind == "slides" else letters
            text = brush.words.phrase(rng, 1, 4) if kind != "terminal" else brush.words.sentence(rng)
            text = brush.fitted(" ".join(text.split()), face, at, size[0] - 2 * left)
            text = "".join(character for character in text if character not in face.missing).strip()
            if text:
                if kind == "signs":
                    brush.write(size[0] / 2, size[1] * rng.uniform(0.3, 0.8), text, face, at, ink, "middle")
                else:
                    brush.write(left, y, text, face, at, ink)
                yield canvas.image.copy(), text, int(rng.integers(1, 6))
            y += at * rng.uniform(1.3, 1.9)
            first = False
            if kind == "signs" or (kind == "slides" and rng.random() < 0.15):
                break


def main(arguments: list[str]) -> int:
    """Writes a film as a video, and prints what is new when."""
    parser = argparse.ArgumentParser(description="Draws a film in which text appears.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--size", type=int, nargs=2, help="width and height in px")
    parser.add_argument("--split", choices=("train", "held_out"), default="held_out")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    made = film(
        (given.seed,), given.split, given.seconds, given.kind, None if given.size is None else tuple(given.size)
    )
    with VideoWriter(given.out, made.frames[0].size, FPS, crf=18) as video:
        for frame in made.frames:
            video.write(frame)
    for number, text in enumerate(made.said):
        if text:
            print(f"{number / FPS:5.1f} s  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
