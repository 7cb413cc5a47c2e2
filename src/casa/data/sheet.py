"""A sheet of samples as one PNG: pictures, what is said about them, and which text belongs to which pictures' window.

    +--------------------------------------+
    | pages.jsonl:17      2 pictures, 648  |
    | |  [picture]   user: What differs?   |     a bar per window: its pictures left, its text right,
    | |  [picture]   assistant: The hat.   |     what the model learns on green
    +--------------------------------------+

Drawn with Pillow alone. Letters beyond ASCII need DejaVu, which matplotlib carries.
"""

import os
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from casa.atomic import replacing
from casa.data.check import Sample
from casa.data.lettering import counted, letters, shortened
from casa.data.windows_of import Window, windows_of

COLUMNS, CARD, GAP, PAD = 3, 600, 28, 22
PICTURES = 190  # width of a window's pictures
MOST_WINDOWS, MOST_PICTURES, MOST_LINES = 6, 8, 7
PAPER, SHEET, LINE = "#FFFFFF", "#F3F4F6", "#DADDE2"
INK, FAINT, LEARNED = "#1F2430", "#7A8190", "#E4F3EA"
# Okabe and Ito's colours, told apart by all readers; grey for text without pictures
BARS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BODY, SMALL, TITLE = 17, 14, 26


def draw_sheet(samples: Sequence[Sample], path: str | os.PathLike[str], title: str = "", note: str = "") -> None:
    """Writes the samples as cards in columns. title, note: two lines above them.

    Raises:
        UserError: the file cannot be written there.
    """
    cards = [_card(sample) for sample in samples]
    columns: list[list[Image.Image]] = [[] for _ in range(min(COLUMNS, max(1, len(cards))))]
    for card in cards:
        # into the shortest column, so that the sheet has an even foot
        min(columns, key=lambda column: sum(entry.height + GAP for entry in column)).append(card)
    head = 118
    height = head + max((sum(card.height + GAP for card in column) for column in columns), default=0)
    width = max(2, len(columns)) * (CARD + GAP) + GAP
    sheet = Image.new("RGB", (width, max(height, head + GAP)), SHEET)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 24), shortened(title, letters(TITLE, True), width - 2 * GAP), fill=INK, font=letters(TITLE, True))
    draw.text((GAP, 62), shortened(note, letters(BODY), width - 2 * GAP), fill=FAINT, font=letters(BODY))
    _legend(draw, (GAP, 90))
    for at, column in enumerate(columns):
        top = head
        for card in column:
            sheet.paste(card, (GAP + at * (CARD + GAP), top))
            top += card.height + GAP
    with replacing(path) as unfinished:
        sheet.save(unfinished, "PNG")


def _legend(draw: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
    left, top = at
    font = letters(SMALL)
    for colours, text in (
        (BARS[:3], "a window: pictures, and the text that sees them"),
        ((FAINT,), "no picture in sight"),
    ):
        for colour in colours:
            draw.rectangle((left, top, left + 5, top + 16), fill=colour)
            left += 10
        draw.text((left + 2, top), text, fill=FAINT, font=font)
        left += round(font.getlength(text)) + 28
    draw.rounded_rectangle((left, top, left + 26, top + 16), 4, fill=LEARNED, outline=LINE)
    draw.text((left + 34, top), "what the model learns to say", fill=FAINT, font=font)


def _card(sample: Sample) -> Image.Image:
    """One record."""
    record, windows = sample.record, windows_of(sample.record)
    shown = windows[:MOST_WINDOWS]
    times = [picture.time for picture in record.pictures()]
    number, blocks = 0, []
    for window in shown:
        colour = FAINT
        if window.pictures:
            colour = BARS[number % len(BARS)]
            number += 1
        blocks.append(_block(window, sample.thumbnails, times, colour))
    rest = len(windows) - len(shown)
    height = 2 * PAD + 30 + sum(block.height + 14 for block in blocks) + (24 if rest else 0)
    card = Image.new("RGB", (CARD, height), SHEET)
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((0, 0, CARD - 1, height - 1), 14, fill=PAPER, outline=LINE, width=2)
    pictures = len(times)
    right = f"{counted(pictures, 'picture')}, {counted(sample.tokens, 'image token')}" if pictures else "text only"
    room = CARD - 2 * PAD - round(letters(SMALL).getlength(right)) - 16
    origin = str(replace(record.origin, path=Path(record.origin.path).name))
    draw.text((PAD, PAD - 4), shortened(origin, letters(SMALL, True), room), fill=INK, font=letters(SMALL, True))
    draw.text((CARD - PAD, PAD - 4), right, fill=FAINT, font=letters(SMALL), anchor="ra")
    top = PAD + 30
    for block in blocks:
        card.paste(block, (PAD, top))
        top += block.height + 14
    if rest:
        draw.text((PAD, top), f"and {counted(rest, 'window')} more", fill=FAINT, font=letters(SMALL))
    return card


@dataclass
class _Said:
    """Lines of one text as they are drawn."""

    role: str
    lines: list[str]

    @property
    def height(self) -> int:
        return 20 + len(self.lines) * _step(BODY) + 12


def _block(
    window: Window, thumbnails: Sequence[Image.Image], times: Sequence[float | None], colour: str
) -> Image.Image:
    """One window: its bar, its pictures, its text."""
    width = CARD - 2 * PAD
    numbers = [n for n in window.pictures[:MOST_PICTURES] if n < len(thumbnails)]
    rest = len(window.pictures) - len(numbers)
    # many pictures stand two abreast
    abreast = 2 if len(window.pictures) > 2 else 1
    faces = [_framed(thumbnails[n], times[n], (PICTURES - 8 * (abreast - 1)) // abreast) for n in numbers]
    shelves = [faces[n : n + abreast] for n in range(0, len(faces), abreast)]
    left = 18
    indent = left + (PICTURES + 18 if window.pictures else 0)
    said = [_Said(role, _wrapped(text, width - indent - 16)) for role, text in _together(window)]
    pictures = sum(max(face.height for face in shelf) + 8 for shelf in shelves) + (22 if rest else 0)
    height = max(36, pictures - 8 if pictures else 0, sum(text.height + 6 for text in said) - 6)
    block = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(block)
    draw.rounded_rectangle((0, 0, 5, height - 1), 2, fill=colour)
    top = 0
    for shelf in shelves:
        for at, face in enumerate(shelf):
            block.paste(face, (left + at * (PICTURES + 8) // abreast, top))
        top += max(face.height for face in shelf) + 8
    if rest:
        draw.text((left, top), f"and {counted(rest, 'picture')} more", fill=FAINT, font=letters(SMALL))
    top = 0
    for text in said:
        if text.role == "assistant":
            draw.rounded_rectangle((indent - 4, top, width - 1, top + text.height - 1), 8, fill=LEARNED)
        draw.text((indent + 4, top + 5), text.role, fill=FAINT, font=letters(SMALL))
        for number, line in enumerate(text.lines):
            below = top + 24 + number * _step(BODY)
            if _from_the_right(line):
                draw.text((width - 12, below), line, fill=INK, font=letters(BODY), anchor="ra")
            else:
                draw.text((indent + 4, below), line, fill=INK, font=letters(BODY))
        top += text.height + 6
    if not said:
        draw.text((indent + 4, 4), "(silence)", fill=FAINT, font=letters(SMALL))
    return block


def _together(window: Window) -> list[tuple[str, str]]:
    """What one side says in a row is one text."""
    found: list[tuple[str, str]] = []
    for role, text in window.said:
        if found and found[-1][0] == role:
            found[-1] = (role, f"{found[-1][1]}\n{text}")
        else:
            found.append((role, text))
    return found


def _framed(image: Image.Image, time: float | None, width: int) -> Image.Image:
    """A picture at most `width` px wide and not too tall, with a thin border, and its time."""
    scale = min(width / image.width, 1.25 * width / image.height)
    size = (max(12, round(image.width * scale)), max(12, round(image.height * scale)))
    face = image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(face, "RGBA")
    draw.rectangle((0, 0, face.width - 1, face.height - 1), outline=LINE)
    if time is not None:
        text = f"{time:.1f} s"
        length = letters(SMALL).getlength(text)
        draw.rectangle((0, face.height - 20, length + 10, face.height), fill=(0, 0, 0, 170))
        draw.text((5, face.height - 19), text, fill="#FFFFFF", font=letters(SMALL))
    return face


def _wrapped(text: str, width: int) -> list[str]:
    """Lines no wider than `width` px, at most `MOST_LINES`."""
    font = letters(BODY)
    lines: list[str] = []
    # no more is looked at than can be shown, however long the text is
    for paragraph in text[:2000].strip().splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width and len(lines) <= MOST_LINES:
                # a word longer than a line is broken where it must be
                cut = max(1, bisect_right(range(1, len(line)), width, key=lambda n: font.getlength(line[:n])))
                lines.append(line[:cut])
                line = line[cut:]
            if len(lines) > MOST_LINES:
                break
        lines.append(line)
        if len(lines) > MOST_LINES:
            break
    if len(lines) > MOST_LINES or len(text) > 2000:
        lines = [*lines[: MOST_LINES - 1], shortened(" ".join(lines[MOST_LINES - 1 :]) + " ", font, width, always=True)]
    return lines


def _from_the_right(line: str) -> bool:
    """Whether the first letter with a direction is of a script written from right to left."""
    kinds = (unicodedata.bidirectional(letter) for letter in line)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _step(size: int) -> int:
    return round(size * 1.35)
