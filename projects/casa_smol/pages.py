"""Pages drawn by seed: paragraphs, columns, receipts, tables, forms, screens and scattered labels.

A page is a `Canvas`; `draw(rng, size, split)` makes one whole. Families of fonts and words follow the split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from projects.casa_smol.canvas import RGB, Canvas, width_of
from projects.casa_smol.fonts import CHARACTERS, Face, kins
from projects.casa_smol.words import Words, pick

Box = tuple[float, float, float, float]  # left, top, right, bottom
LEAST_CONTRAST = 0.36


@dataclass(frozen=True)
class Theme:
    """Colours that go together: paper, a panel beside it, ink, a strong colour, and whether it is dark."""

    paper: RGB
    panel: RGB
    ink: RGB
    accent: RGB
    dark: bool


class Brush:
    """What the layouts draw with: a canvas, a generator, texts and faces of one split, a theme."""

    def __init__(self, canvas: Canvas, rng: Generator, split: str, theme: Theme) -> None:
        self.canvas, self.rng, self.theme = canvas, rng, theme
        self.words, self.split = Words(split), split

    def face(self) -> Face:
        """A face of the split: kin first, so that families with many weights do not rule."""
        return pick(self.rng, pick(self.rng, kins(self.split)))

    def size(self, low: int = 10, high: int = 40) -> int:
        """A size in pixels an em; small ones as often as twice as large ones."""
        return round(float(np.exp(self.rng.uniform(np.log(low), np.log(high + 0.4)))))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def ink_on(self, ground: RGB, coloured: float = 0.25) -> RGB:
        """An ink that can be read on a ground: mostly near black or white, sometimes a colour."""
        for _ in range(20):
            if self.chance(coloured):
                ink = tuple(int(v) for v in self.rng.integers(0, 256, 3))
            else:
                level = self.rng.integers(0, 90) if _light(ground) > 0.5 else self.rng.integers(170, 256)
                ink = tuple(int(min(255, max(0, level + shift))) for shift in self.rng.integers(-10, 11, 3))
            if abs(_light(ink) - _light(ground)) > LEAST_CONTRAST:
                return ink  # type: ignore[return-value]
        return (0, 0, 0) if _light(ground) > 0.5 else (255, 255, 255)

    def any_text(self) -> str:
        """A short text of any kind."""
        kind = self.rng.random()
        if kind < 0.45:
            return self.words.phrase(self.rng)
        if kind < 0.65:
            return self.words.styled(self.rng)
        return self.words.piece(self.rng) if kind < 0.92 else self.words.symbols(self.rng, CHARACTERS)

    def write(
        self, x: float, baseline: float, text: str, face: Face, size: int, ink: RGB, align: str = "left"
    ) -> float:
        """Writes a line that begins, has its middle, or ends at x; returns where it ends."""
        if align != "left":
            x -= width_of(text, face, size) * (0.5 if align == "middle" else 1.0)
        return self.canvas.text(x, baseline, text, face, size, ink)

    def fitted(self, text: str, face: Face, size: int, width: float) -> str:
        """The words of a text that fit into a width; cut within the first word where not even that does."""
        while text and width_of(text, face, size) > width:
            text = text.rpartition(" ")[0] if " " in text.strip() else text[:-1]
        return text.strip()


def _light(rgb: Any) -> float:
    return (0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]) / 255


def theme(rng: Generator) -> Theme:
    """Light three times of four; paper white, tinted or coloured."""
    dark, kind = rng.random() < 0.27, rng.random()
    if dark:
        paper = rng.integers(0, 60, 3) if kind < 0.5 else np.full(3, rng.integers(0, 60))
    elif kind < 0.4:
        paper = np.full(3, 255)
    elif kind < 0.85:
        paper = 255 - rng.integers(0, 45, 3)
    else:
        paper = 255 - rng.integers(0, 130, 3)
    shift = int(rng.integers(6, 40)) * (1 if dark else -1)
    panel = np.clip(paper.astype(int) + shift + rng.integers(-6, 7, 3), 0, 255)
    accent = rng.permutation([int(rng.integers(0, 90)), int(rng.integers(40, 200)), int(rng.integers(140, 256))])
    level = rng.integers(195, 256) if dark else rng.integers(0, 80)
    ink = np.clip(level + rng.integers(-14, 15, 3), 0, 255)
    return Theme(*(tuple(int(v) for v in colour) for colour in (paper, panel, ink, accent)), bool(dark))  # type: ignore[arg-type]


def draw(rng: Generator, size: tuple[int, int], split: str = "train", layout: str | None = None) -> Canvas:
    """A page of `size` (width, height). layout: a name in LAYOUTS; any if left out."""
    colours = theme(rng)
    canvas = Canvas(size, colours.paper)
    brush = Brush(canvas, rng, split, colours)
    names = list(LAYOUTS)
    name = layout or names[int(rng.choice(len(names), p=SHARES))]
    edge = int(rng.integers(-10, 24))
    LAYOUTS[name](brush, (edge, edge, size[0] - edge, size[1] - edge))
    return canvas


def paragraphs(brush: Brush, box: Box, high: int = 40) -> None:
    """Running text, one or two faces, left, centred, right or justified by its ragged words."""
    left, y, right, bottom = box
    while y < bottom - 8:
        face, size = brush.face(), brush.size(10, high)
        ink = brush.ink_on(brush.theme.paper, 0.2)
        leading = size * brush.rng.uniform(1.12, 1.7)
        align = pick(brush.rng, ("left", "left", "left", "middle", "right"))
        x = {"left": left, "middle": (left + right) / 2, "right": right}[align]
        queue: list[str] = []
        for _ in range(int(brush.rng.integers(1, 9))):
            y += leading
            if y > bottom:
                break
            while width_of(" ".join(queue), face, size) < (right - left) * 1.05:
                queue += (brush.words.sentence(brush.rng) if brush.chance(0.85) else brush.any_text()).split()
            line = brush.fitted(" ".join(queue), face, size, right - left)
            queue = queue[max(1, len(line.split())) :]
            if brush.chance(0.12):  # the short last line of a paragraph
                line = brush.fitted(line, face, size, (right - left) * brush.rng.uniform(0.2, 0.8))
                queue = []
            end = brush.write(x, y, line, face, size, ink, align)
            if align == "left" and brush.chance(0.04):
                brush.canvas.shape(
                    "line", (left, y + size * 0.15, end, y + size * 0.15), fill=ink, width=1 + size // 20
                )
        y += size * brush.rng.uniform(0.2, 1.0)
        if brush.chance(0.12):
            brush.canvas.shape(
                "line", (left, y, right, y), fill=brush.theme.accent, width=int(brush.rng.integers(1, 4))
            )
            y += 4


def columns(brush: Brush, box: Box) -> None:
    """Two or three columns of small text, with a title above and rules or panels between."""
    left, top, right, bottom = box
    if brush.chance(0.6):
        face, size = brush.face(), brush.size(16, 40)
        top += size * 1.2
        brush.write(
            left,
            top,
            brush.fitted(brush.words.phrase(brush.rng, 2, 5), face, size, right - left),
            face,
            size,
            brush.theme.ink,
        )
        top += size * 0.3
    count, gap = int(brush.rng.integers(2, 4)), brush.rng.uniform(8, 22)
    width = (right - left - gap * (count - 1)) / count
    for number in range(count):
        x = left + number * (width + gap)
        if number and brush.chance(0.4):
            brush.canvas.shape("line", (x - gap / 2, top, x - gap / 2, bottom), fill=brush.theme.panel, width=1)
        paragraphs(brush, (x, top, x + width, bottom), high=20)


def receipt(brush: Brush, box: Box) -> None:
    """A head, items with their prices at the right, sums, thanks."""
    left, y, right, bottom = box
    face, size = brush.face(), brush.size(10, 24)
    ink, step = brush.ink_on(brush.theme.paper, 0.1), size * brush.rng.uniform(1.15, 1.7)
    rng, words = brush.rng, brush.words

    def line(label: str, value: str = "", big: float = 1.0) -> None:
        nonlocal y
        y += step * big
        at = round(size * big)
        room = right - left - width_of(value + "  ", face, at)
        brush.write(left, y, brush.fitted(label, face, at, room), face, at, ink)
        brush.write(right, y, value, face, at, ink, "right")

    for _ in range(int(rng.integers(1, 4))):
        at = round(size * rng.uniform(1, 1.5))
        y += at * 1.3
        text = words.phrase(rng) if brush.chance(0.6) else words.piece(rng)
        brush.write((left + right) / 2, y, brush.fitted(text, face, at, right - left), face, at, ink, "middle")
    while y < bottom - step * 4:
        kind = rng.random()
        if kind < 0.1:
            y += step * 0.6
            if brush.chance(0.5):
                brush.canvas.shape("line", (left, y, right, y), fill=ink, width=1)
            else:
                sign = pick(rng, "-=*.")
                brush.write(left, y, sign * int((right - left) / max(2.0, width_of(sign, face, size))), face, size, ink)
        elif kind < 0.3:
            line(f"{rng.integers(1, 20)} x {words.phrase(rng, 1, 2)}", words.price(rng))
        elif kind < 0.8:
            line(words.phrase(rng, 1, 3), words.price(rng))
        else:
            line(words.styled(rng) + ":", words.piece(rng))
    for label in ("Subtotal", "Tax", pick(rng, ("TOTAL", "Total", "Amount due", "Balance"))):
        if brush.chance(0.8):
            line(label, words.price(rng), big=1.0 if label != "TOTAL" else rng.uniform(1, 1.5))


def table(brush: Brush, box: Box) -> None:
    """Rows and columns with rules or stripes; a head on a colour; numbers to the right."""
    left, top, right, bottom = box
    rng, canvas, colours = brush.rng, brush.canvas, brush.theme
    face, size = brush.face(), brush.size(10, 22)
    height = size * rng.uniform(1.5, 2.4)
    count = int(rng.integers(2, 6))
    cuts = np.sort(rng.uniform(0.15, 0.95, count - 1)) if brush.chance(0.4) else np.arange(1, count) / count
    edges = [left, *(left + cuts * (right - left)), right]
    numeric, rules, stripes = rng.random(count) < 0.5, brush.chance(0.6), brush.chance(0.4)
    y, row = top, 0
    while y + height < bottom + size:
        ground, ink = colours.paper, colours.ink
        if row == 0 and brush.chance(0.7):
            ground = colours.accent
        elif stripes and row % 2:
            ground = colours.panel
        if ground != colours.paper:
            canvas.shape("rectangle", (left, y, right, y + height), fill=ground)
            ink = brush.ink_on(ground, 0.0)
        for column in range(count):
            start, end = edges[column] + 4, edges[column + 1] - 4
            text = words_of_cell(brush, row, bool(numeric[column]))
            text = brush.fitted(text, face, size, end - start)
            right_hand = numeric[column] and row
            brush.write(end if right_hand else start, y + height / 2 + size * 0.34, text, face, size, ink,
                        "right" if right_hand else "left")  # fmt: skip
        y, row = y + height, row + 1
        if rules:
            canvas.shape("line", (left, y, right, y), fill=colours.ink if brush.chance(0.1) else colours.panel, width=1)
    if rules and brush.chance(0.6):
        for x in edges:
            canvas.shape("line", (x, top, x, y), fill=colours.panel, width=1)


def words_of_cell(brush: Brush, row: int, numeric: bool) -> str:
    """The text of a table's cell: a head in the first row, numbers or short texts below."""
    if row == 0:
        return brush.words.phrase(brush.rng, 1, 2)
    if numeric:
        return brush.words.number(brush.rng) if brush.chance(0.6) else brush.words.price(brush.rng)
    return brush.any_text()


def form(brush: Brush, box: Box) -> None:
    """Labels with what was filled in, beside them or below, on lines or in boxes."""
    left, y, right, bottom = box
    rng, canvas, colours = brush.rng, brush.canvas, brush.theme
    face, other, size = brush.face(), brush.face(), brush.size(10, 22)
    beside, boxed = brush.chance(0.6), brush.chance(0.5)
    middle = left + (right - left) * rng.uniform(0.3, 0.5)
    ink = brush.ink_on(colours.paper, 0.3)
    while y < bottom - size * 3:
        label = brush.words.phrase(rng, 1, 2) + pick(rng, (":", "", ":", "*"))
        y += size * rng.uniform(1.6, 2.2)
        brush.write(left, y, brush.fitted(label, face, size, middle - left - 4), face, size, colours.ink)
        x = middle if beside else left
        if not beside:
            y += size * 1.7
        value = brush.fitted(brush.any_text(), other, size, right - x - 8)
        if boxed:
            canvas.shape("rectangle", (x - 4, y - size * 1.15, right, y + size * 0.45), outline=colours.accent, width=1)
        else:
            canvas.shape("line", (x, y + size * 0.25, right, y + size * 0.25), fill=colours.panel, width=1)
        brush.write(x + 2, y, value, other, size, ink)


def screen(brush: Brush, box: Box) -> None:
    """A window: title bar, tabs, lists, buttons, fields, boxes to tick."""
    left, top, right, bottom = box
    rng, canvas, colours = brush.rng, brush.canvas, brush.theme
    face, size = brush.face(), brush.size(10, 20)
    bar = size * rng.uniform(1.8, 2.6)
    canvas.shape("rectangle", (0, top, canvas.size[0], top + bar), fill=colours.accent)
    title = brush.fitted(brush.words.phrase(rng), face, size, (right - left) * 0.7)
    brush.write(left + 8, top + bar / 2 + size * 0.35, title, face, size, brush.ink_on(colours.accent, 0.0))
    for number in range(3):
        x, middle, half = right - 12 - number * (size + 2), top + bar / 2, size * 0.3
        spot = (x - half, middle - half, x + half, middle + half)
        canvas.shape("ellipse", spot, fill=brush.ink_on(colours.accent))
    y = top + bar + size * 0.6
    while y < bottom - size * 1.5:
        x, tall = left + rng.uniform(0, 12), size * rng.uniform(1.6, 2.6)
        while x < right - size * 4:
            text = brush.fitted(brush.any_text(), face, size, min(right - x - size * 2, size * 14))
            wide = width_of(text, face, size) + size * rng.uniform(0.8, 2)
            kind = rng.random()
            where, ground = (x, y, x + wide, y + tall), colours.paper
            if kind < 0.4:
                ground = pick(rng, (colours.accent, colours.panel, tuple(int(v) for v in rng.integers(0, 256, 3))))
                canvas.shape("rounded_rectangle", where, radius=int(rng.integers(0, 9)), fill=ground)
            elif kind < 0.6:
                canvas.shape(
                    "rounded_rectangle", where, radius=int(rng.integers(0, 5)), outline=colours.accent, width=1
                )
            elif kind < 0.75:
                mark = (x - size * 0.2, y + tall / 2 - size * 0.35, x + size * 0.5, y + tall / 2 + size * 0.35)
                canvas.shape(pick(rng, ("rectangle", "ellipse")), mark, outline=colours.ink, width=1)
                x += size * 0.6
            elif kind < 0.82:
                canvas.shape("line", (x, y + tall, x + wide, y + tall), fill=colours.accent, width=2)
            brush.write(x + size * 0.4, y + tall / 2 + size * 0.35, text, face, size, brush.ink_on(ground, 0.15))
            x += wide + size * rng.uniform(0.4, 1.5)
            if brush.chance(0.35):
                break
        y += tall + size * rng.uniform(0.2, 0.9)


def scattered(brush: Brush, box: Box) -> None:
    """Labels in many faces and colours among bars, lines and spots, as on charts, signs and drawings."""
    left, top, right, bottom = box
    rng, canvas = brush.rng, brush.canvas
    for _ in range(int(rng.integers(0, 14))):
        a, b = (tuple(float(v) for v in rng.uniform((left, top), (right, bottom))) for _ in range(2))
        corners = (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1]))
        fill = tuple(int(v) for v in rng.integers(0, 256, 3))
        kind = pick(rng, ("line", "line", "rectangle", "ellipse", "arc"))
        if kind == "line":
            canvas.shape("line", (*a, *b), fill=fill, width=int(rng.integers(1, 6)))
        elif kind == "arc":
            canvas.shape("arc", corners, 0, int(rng.integers(40, 360)), fill=fill, width=int(rng.integers(1, 5)))
        else:
            canvas.shape(kind, corners, fill=fill)
    taken: list[Box] = []
    for _ in range(int(rng.integers(8, 36))):
        face, size = brush.face(), brush.size(10, 44)
        text = brush.any_text()
        wide = width_of(text, face, size)
        x, y = rng.uniform(left - 20, right - 20), rng.uniform(top + size, bottom)
        spot = (x - 3, y - size * 1.05, x + wide + 3, y + size * 0.35)
        if any(spot[0] < o[2] and o[0] < spot[2] and spot[1] < o[3] and o[1] < spot[3] for o in taken):
            continue
        taken.append(spot)
        under = np.asarray(canvas.ground.crop(tuple(int(v) for v in spot)), dtype=np.float32)  # type: ignore[arg-type]
        lights = under @ np.array([0.3, 0.59, 0.11], dtype=np.float32) / 255
        ground = tuple(int(v) for v in under.reshape(-1, 3).mean(0))
        if lights.max() - lights.min() > 0.35 or brush.chance(0.15):  # nothing can be read on black and white alike
            ground = tuple(int(v) for v in rng.integers(0, 256, 3))
            canvas.shape("rounded_rectangle", spot, radius=int(rng.integers(0, 8)), fill=ground)
        brush.write(x, y, text, face, size, brush.ink_on(ground, 0.5))  # type: ignore[arg-type]


LAYOUTS: dict[str, Callable[[Brush, Box], None]] = {
    "paragraphs": paragraphs,
    "columns": columns,
    "receipt": receipt,
    "table": table,
    "form": form,
    "screen": screen,
    "scattered": scattered,
}
SHARES = np.array([0.3, 0.1, 0.14, 0.12, 0.08, 0.13, 0.13])
