"""A page being drawn, which remembers where every character stands.

Beside the picture it keeps the ground (the same without text), so that colours can be told apart from what is
written on them. Coordinates are pixels, x to the right and y down.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from projects.casa_smol.fonts import CHARACTERS, Face

CLASS_OF = {character: number for number, character in enumerate(CHARACTERS, start=1)}
COLOURS = ["black", "white", "grey", "red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "brown"]
RGB = tuple[int, int, int]


@dataclass
class Glyphs:
    """All characters of a page, one row each.

    boxes: float (G, 4), left, top, right, bottom: the advance, from the x-height to the baseline.
    lines: float (G, 2), top and bottom of the character's line of writing.
    classes: by `CLASS_OF`; the space between words has one too.
    words, inks: number of the word (-1 for a space) and of the ink among `COLOURS`.
    runs: number of the text that was written in one go; its characters follow each other.
    """

    boxes: np.ndarray
    lines: np.ndarray
    classes: np.ndarray
    words: np.ndarray
    inks: np.ndarray
    runs: np.ndarray


@dataclass
class Canvas:
    """A page of `size` (width, height) in one colour, to draw on."""

    size: tuple[int, int]
    paper: RGB
    glyphs: list[tuple[float, ...]] = field(default_factory=list)
    words: int = 0
    runs: int = 0

    def __post_init__(self) -> None:
        self.image, self.ground = (Image.new("RGB", self.size, self.paper) for _ in range(2))
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ground)

    def shape(self, kind: str, *where: object, **how: object) -> None:
        """A shape of PIL's ImageDraw, by the name of its method ("rectangle", "line", "ellipse" ...)."""
        for pen in self.pens:
            getattr(pen, kind)(*where, **how)

    def paste(self, picture: Image.Image, at: tuple[int, int]) -> None:
        """A picture, whose letters, if it has any, count as none."""
        self.image.paste(picture, at)
        self.ground.paste(picture, at)

    def text(self, x: float, baseline: float, text: str, face: Face, size: int, ink: RGB) -> float:
        """Writes one line from x on, on a baseline; returns where it ends. Characters the face lacks are left out."""
        text = "".join(character for character in text if character in CLASS_OF and character not in face.missing)
        font = face.at(size)
        # whole pixels, as the font is hinted for; otherwise Pillow draws between them
        x, baseline = round(x), round(baseline)
        self.pens[0].text((x, baseline), text, fill=ink, font=font, anchor="ls")
        rise, top, bottom = _heights(face, size)
        colour, end, word = colour_of(ink), 0.0, -1
        for place, character in enumerate(text):
            advance = _advance(face, size, character)
            end = font.getlength(text[: place + 1]) if place else advance
            if character == " ":
                word = -1
            elif word < 0:
                word, self.words = self.words, self.words + 1
            self.glyphs.append((
                x + end - advance, baseline - rise, x + end, baseline, baseline - top, baseline + bottom,
                CLASS_OF[character], word, colour, self.runs,
            ))  # fmt: skip
        self.runs += 1
        return x + end

    def found(self) -> Glyphs:
        """What was written."""
        table = np.array(self.glyphs, dtype=np.float64).reshape(-1, 10)
        whole = table[:, 6:].astype(np.int64)
        return Glyphs(table[:, :4], table[:, 4:6], *whole.T)


def width_of(text: str, face: Face, size: int) -> float:
    """How wide a line of text is."""
    return face.at(size).getlength(text)


@lru_cache(maxsize=65536)
def _advance(face: Face, size: int, character: str) -> float:
    return face.at(size).getlength(character)


@lru_cache(maxsize=4096)
def _heights(face: Face, size: int) -> tuple[float, float, float]:
    """Above the baseline: x-height, ascenders; below it: descenders."""
    font = face.at(size)
    x, tall, deep = (font.getbbox(letter, anchor="ls") for letter in ("x", "d", "p"))
    return max(2.0, -x[1]), max(3.0, -tall[1]), max(0.0, deep[3])


def colour_of(rgb: RGB) -> int:
    """Number of a colour's plain name among `COLOURS`."""
    return int(colours_of(np.array(rgb, dtype=np.uint8).reshape(1, 1, 3))[0, 0])


def colours_of(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) to the numbers of plain colour names, uint8 (H, W)."""
    values = image.astype(np.float32) / 255
    high, low = values.max(-1), values.min(-1)
    spread = high - low
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    safe = np.maximum(spread, 1e-6)
    cooler = np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    hue = np.where(high == red, (green - blue) / safe % 6, cooler) * 60
    found = np.select(
        [hue < 15, hue < 42, hue < 68, hue < 160, hue < 195, hue < 258, hue < 292, hue < 338],
        [3, 4, 5, 6, 7, 8, 9, 10],
        3,
    )
    found = np.where((found == 4) & (high < 0.68) | (found == 3) & (high < 0.6) & (hue > 5) & (hue < 42), 11, found)
    found = np.where((found == 3) & (low > 0.5), 10, found)
    plain = (spread < 0.12) | (spread < 0.25 * high) & (spread < 0.16)
    greys = np.select([high < 0.27, high > 0.86], [0, 1], 2)
    found = np.where(plain | (high < 0.16), greys, found)
    return np.where((low > 0.88), 1, found).astype(np.uint8)
