"""Printed lines, and pages of up to twenty lines of which one is asked for."""

from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from projects.casa_smol.canvas import Canvas, width_of
from projects.casa_smol.damage import worn
from projects.casa_smol.fonts import Face
from projects.casa_smol.pages import Brush, theme
from projects.casa_smol.tasks.asked import Turn, ordinal, some, turn
from projects.casa_smol.words import pick

READ = (
    "What does it say?", "Read the text.", "What is written here?", "Read this line.", "What does the line say?",
    "Transcribe the text.", "What text do you see?", "Please read it to me.",
)  # fmt: skip
READ_NUMBERED = (
    "Read line {n}.", "What does line {n} say?", "What is written in line {n}?", "Read the {nth} line.",
    "What does the {nth} line say?", "Transcribe line {n}.", "Give me the text of line {n}.",
)  # fmt: skip
READ_LAST = ("Read the last line.", "What does the last line say?", "What is written at the bottom?")
READ_AFTER = (
    'What is the line after "{line}"?', 'Which line comes after "{line}"?', 'Read the line below "{line}".',
    'What follows "{line}"?',
)  # fmt: skip
READ_BEFORE = (
    'What is the line before "{line}"?',
    'Read the line above "{line}".',
    'Which line stands above "{line}"?',
)
COUNT = ("How many lines are there?", "How many lines does the page have?", "Count the lines.")
FIRST_WORD = ("What is the first word of line {n}?", "Which word does line {n} begin with?")
LAST_WORD = ("What is the last word of line {n}?", "Which word does line {n} end with?")
WHERE = ('Which line says "{line}"?', 'What is the number of the line "{line}"?', 'In which line is "{line}"?')


def _text(brush: Brush, rng: Generator, words: int) -> str:
    """So many words as signs, notes and lists have them; some are numbers."""
    parts = [brush.words.styled(rng) if rng.random() < 0.85 else brush.words.piece(rng) for _ in range(words)]
    kind = rng.random()
    text = " ".join(parts)
    if kind < 0.4:
        text = text[:1].upper() + text[1:]
    return text + (pick(rng, (".", ":", "!", "?", ",", ";")) if rng.random() < 0.15 else "")


def _readable(text: str, face: Face) -> str:
    return " ".join("".join(c for c in text if c not in face.missing).split())


def line(rng: Generator, split: str) -> tuple[Image.Image, tuple[Turn, ...]]:
    """One to six words of 14 to 40 px on a strip of their own."""
    colours = theme(rng)
    brush = Brush(Canvas((8, 8), colours.paper), rng, split, colours)
    face, size = brush.face(), brush.size(14, 40)
    text = _readable(_text(brush, rng, int(rng.integers(1, 7))), face) or "?"
    while width_of(text, face, size) > 600 and " " in text:
        text = text.rpartition(" ")[0]
    margins = rng.integers(4, 32, 4)
    wide = max(64, round(width_of(text, face, size)) + int(margins[0] + margins[1]))
    high = max(32, round(size * 1.25) + int(margins[2] + margins[3]) // 2)
    canvas = Canvas((wide, high), colours.paper)
    canvas.text(int(margins[0]), high / 2 + size * 0.34, text, face, size, brush.ink_on(colours.paper, 0.3))
    return worn(canvas.image, rng), (turn(rng, READ, text),)


def page(rng: Generator, split: str) -> tuple[Image.Image, tuple[Turn, ...]]:
    """Three to twenty lines on a page of 448 to 896 px, in one face or a few, sometimes numbered or ruled."""
    width, height = (int(side) for side in rng.integers(448, 897, 2))
    colours = theme(rng)
    canvas = Canvas((width, height), colours.paper)
    brush = Brush(canvas, rng, split, colours)
    left = int(rng.integers(12, 60))
    wanted = int(rng.integers(3, 21))
    step = (height - 30) / wanted
    size = int(np.clip(brush.size(14, 36), 12, step / 1.15))
    step = min(step, size * rng.uniform(1.3, 3.0))
    face, other, ink = brush.face(), brush.face(), brush.ink_on(colours.paper, 0.25)
    numbered, ruled, y = brush.chance(0.08), brush.chance(0.12), rng.uniform(5, max(6.0, height - step * wanted - 10))
    align = pick(rng, ("left", "left", "left", "middle"))
    lines: list[str] = []
    for number in range(1, wanted + 1):
        own = other if number == 1 and brush.chance(0.4) else face
        text = _readable(_text(brush, rng, int(rng.integers(1, 8))), own)
        text = brush.fitted(text, own, size, width - 2 * left - 30)
        if not text or text in lines:
            continue
        y += step
        shown = f"{len(lines) + 1}. {text}" if numbered else text
        brush.write(left if align == "left" else width / 2, y - step * 0.3, shown, own, size, ink, align)
        if ruled:
            canvas.shape("line", (left, y, width - left, y), fill=colours.panel, width=1)
        lines.append(text)
    image = canvas.image
    if brush.chance(0.12):
        image = image.rotate(rng.normal(0, 1.0), Image.Resampling.BICUBIC, fillcolor=colours.paper)
    return worn(image, rng), some(rng, list(_about(rng, lines)), 6)


def _about(rng: Generator, lines: list[str]) -> Any:
    count = len(lines)
    for number in rng.permutation(count)[:4].tolist():
        text, names = lines[number], {"n": number + 1, "nth": ordinal(number + 1), "line": lines[number]}
        yield turn(rng, READ_NUMBERED, text, **names)
        if '"' not in text:
            if number + 1 < count:
                yield turn(rng, READ_AFTER, lines[number + 1], **names)
            if number:
                yield turn(rng, READ_BEFORE, lines[number - 1], **names)
            yield turn(rng, WHERE, number + 1, f"line {number + 1}", ordinal(number + 1), **names)
    number = int(rng.integers(count))
    yield turn(rng, READ_LAST, lines[-1])
    yield turn(rng, COUNT, count)
    yield turn(rng, FIRST_WORD, lines[number].split()[0], n=number + 1)
    yield turn(rng, LAST_WORD, lines[number].split()[-1], n=number + 1)
