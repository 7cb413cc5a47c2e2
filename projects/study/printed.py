"""Small pictures of print for the real scale: a number, and a list of prices.

Pages, charts and screens of casa-smol are 300 to 1,200 image tokens, which insertion has to carry through the whole
text model. These are 10 to 200, drawn with the same fonts, colours and wear; fonts and words follow the split.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.random import Generator
from PIL import Image

from projects.casa_smol.canvas import Canvas, width_of
from projects.casa_smol.damage import worn
from projects.casa_smol.pages import Brush, theme
from projects.casa_smol.tasks import SPLITS
from projects.casa_smol.tasks.asked import Asked, Turn, some, turn
from projects.casa_smol.tasks.lines import READ
from projects.casa_smol.words import pick

COST = ("How much is {name}?", "What does {name} cost?", "What is the price of {name}?", "Read the price of {name}.")
WHICH = ("What costs {price}?", "Which one is {price}?", "What is to be had for {price}?")


def _brush(rng: Generator, split: str) -> Brush:
    colours = theme(rng)
    return Brush(Canvas((8, 8), colours.paper), rng, split, colours)


def number(rng: Generator, split: str) -> tuple[Image.Image, tuple[Turn, ...]]:
    """A whole number of one to four digits, a price or a time, on a strip of its own."""
    brush = _brush(rng, split)
    face, size = brush.face(), brush.size(16, 36)
    text = pick(
        rng,
        (
            str(rng.integers(10 ** rng.integers(1, 5))),
            f"{rng.integers(100)}.{rng.integers(100):02d}",
            f"{rng.integers(24):02d}:{rng.integers(60):02d}",
        ),
    )
    left, above = rng.integers(4, 24, 2)
    wide, high = round(width_of(text, face, size)) + 2 * int(left), round(size * 1.2) + int(above)
    canvas = Canvas((max(64, wide), max(32, high)), brush.theme.paper)
    ink = brush.ink_on(brush.theme.paper, 0.3)
    canvas.text(int(left), canvas.image.height / 2 + size * 0.34, text, face, size, ink)
    return worn(canvas.image, rng), (turn(rng, READ, text),)


def prices(rng: Generator, split: str) -> tuple[Image.Image, tuple[Turn, ...]]:
    """Two to four things with a price each, one below the other, names left and prices right."""
    brush = _brush(rng, split)
    face, size = brush.face(), brush.size(15, 22)
    listed: dict[str, str] = {}
    for _ in range(int(rng.integers(2, 5))):
        name = brush.words.styled(rng).strip()
        price = f"{rng.integers(1, 30)}.{rng.integers(100):02d}"
        if name and price not in listed.values() and width_of(name, face, size) < 130:
            listed[name] = price
    step, right = size * rng.uniform(1.25, 1.6), 150 + int(rng.integers(40, 90))
    canvas = Canvas((right + 10, max(32, round(step * len(listed)) + 12)), brush.theme.paper)
    brush.canvas, ink = canvas, brush.ink_on(brush.theme.paper, 0.3)
    for row, (name, price) in enumerate(listed.items(), start=1):
        brush.write(8, step * row, name, face, size, ink)
        brush.write(right, step * row, price, face, size, ink, "right")
    asked = [turn(rng, COST, price, name=name) for name, price in listed.items()]
    asked += [turn(rng, WHICH, name, price=price) for name, price in listed.items()]
    return worn(canvas.image, rng), some(rng, asked, 4)


PRINTED: dict[str, Callable[[Generator, str], tuple[Image.Image, tuple[Turn, ...]]]] = {
    "number": number,
    "prices": prices,
}


def printed(task: str, split: str, seed: int, count: int) -> Iterator[Asked]:
    """So many pictures of a kind of PRINTED; one on which nothing could be written is drawn again."""
    own = [*PRINTED].index(task), SPLITS.index(split)
    for one in range(count):
        again = 0
        while True:
            drawn = (seed, 29, *own, one, again)
            picture, turns = PRINTED[task](np.random.default_rng(drawn), split)
            if turns:
                break
            again += 1
        yield Asked(task, split, drawn, picture, turns)
