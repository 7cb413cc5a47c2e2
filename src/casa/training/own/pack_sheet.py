"""A packed batch as one PNG: a row per sample, a frame per window, its pictures above its text.

    text   [#########|######|####    ]  1,893 of 2,048       how full both budgets are, a piece per sample
    image  [########|#######|######  ]  19,980 of 20,480

    1  pages.jsonl:17                       1 window, 2 pictures, 648 image and 93 text tokens, 14 learned
       +-----------------+
       | [pict] [pict]   |     as wide as it has image tokens
       | ......##        |     a cell per text token: grey is read, green is learned
       +-----------------+

Drawn with Pillow alone, in the manner of `casa data check`'s sheet.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from casa.atomic import replacing
from casa.data.html_report import counted
from casa.data.lettering import BARS, FAINT, INK, LINE, PAPER, SHEET, letters, shortened
from casa.data.pictures import open_one
from casa.training.samples import Budget, Sample
from casa.windows import Window, WindowLayout

WIDTH, PAD = 1500, 30
BODY, SMALL, TITLE = 16, 14, 26
MOST_SAMPLES, MOST_LINES = 24, 3  # rows; lines of windows in one
PICTURES, CELLS, INSET, GAP = 54, 20, 7, 10  # px: heights of a window's two strips, margins in and between frames
READ, LEARNED, IMAGE, ON_IMAGE, EMPTY = "#C9CED6", "#2E9E5B", "#9CC3E6", "#1F2430", "#E7E9ED"
LEARNED_TEXT = "#D6F0E0"
_SCALES = (12, 10, 8, 6, 5, 4, 3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)  # px per token


@dataclass(frozen=True)
class Scale:
    """px per text token and per image token."""

    text: float
    image: float


@dataclass(frozen=True)
class Row:
    """A sample with its windows; `text_start`, `images` of a window count in the sample."""

    number: int
    sample: Sample
    windows: tuple[Window, ...]


def draw_pack(
    samples: Sequence[Sample],
    path: str | os.PathLike[str],
    *,
    budget: Budget,
    tokenizer: Any,
    split: str = "image",
    title: str = "",
    note: str = "",
) -> None:
    """Writes a pack's samples to a PNG.

    split: what a window is (`FusionConfig.split`; "sample" also for insertion, where all is one stream). title, note:
    two lines above it. Raises UserError if the file cannot be written.
    """
    rows = [_row(number, sample, split) for number, sample in enumerate(samples[:MOST_SAMPLES], start=1)]
    scale = _scale(rows)
    parts = [_head(samples, budget, scale, title, note)]
    parts += [_drawn(row, scale, tokenizer) for row in rows]
    if len(samples) > MOST_SAMPLES:
        parts.append(_line(f"and {len(samples) - MOST_SAMPLES:,} samples more"))
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + PAD), SHEET)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    with replacing(path) as unfinished:
        sheet.save(unfinished, "PNG")


def _row(number: int, sample: Sample, split: str) -> Row:
    places = [(place, sized.tokens) for place, sized in zip(sample.places, sample.pictures, strict=True)]
    return Row(number, sample, WindowLayout.from_insertions([sample.text_tokens], [places], split).windows)


def _scale(rows: Sequence[Row]) -> Scale:
    """The largest cells with which every window fits into a line."""
    room = WIDTH - 2 * PAD - 2 * INSET
    texts = [window.num_text for row in rows for window in row.windows] or [1]
    images = [window.num_image for row in rows for window in row.windows] or [1]
    text = next(scale for scale in (*_SCALES, 0.001) if scale * max(texts) <= room)
    image = next(scale for scale in (*_SCALES, 0.001) if scale * max(images) <= room / 3)
    return Scale(text, image)


def _head(samples: Sequence[Sample], budget: Budget, scale: Scale, title: str, note: str) -> Image.Image:
    part = Image.new("RGB", (WIDTH, 236), SHEET)
    draw = ImageDraw.Draw(part)
    draw.text((PAD, 22), shortened(title, letters(TITLE, True), WIDTH - 2 * PAD), fill=INK, font=letters(TITLE, True))
    draw.text((PAD, 60), shortened(note, letters(BODY), WIDTH - 2 * PAD), fill=FAINT, font=letters(BODY))
    for number, (name, counts, most) in enumerate(
        (
            ("text", [sample.text_tokens for sample in samples], budget.text),
            ("image", [sample.image_tokens for sample in samples], budget.image),
        )
    ):
        _budget_bar(draw, 100 + 40 * number, name, counts, most)
    _legend(draw, 196, scale)
    return part


def _budget_bar(draw: ImageDraw.ImageDraw, top: int, name: str, counts: Sequence[int], most: int) -> None:
    left, right = PAD + 70, WIDTH - PAD - 290
    draw.text((PAD, top + 3), name, fill=INK, font=letters(BODY, True))
    draw.rectangle((left, top, right, top + 26), fill=EMPTY, outline=LINE)
    for number, (stop, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        start = left + (right - left) * (stop - count) / most
        end = left + (right - left) * stop / most
        if count:
            draw.rectangle((start, top, max(start, end - 1), top + 26), fill=BARS[number % len(BARS)])
            if end - start > 24:
                middle = (start + end) / 2
                draw.text((middle, top + 13), str(number + 1), fill=PAPER, font=letters(SMALL, True), anchor="mm")
    told = f"{sum(counts):,} of {most:,} tokens ({100 * sum(counts) / most:.0f} %)"
    draw.text((right + 14, top + 3), told, fill=INK, font=letters(BODY))


def _legend(draw: ImageDraw.ImageDraw, top: int, scale: Scale) -> None:
    left = PAD
    entries = (
        (IMAGE, f"picture, as wide as its tokens ({_measure(scale.image)})"),
        (READ, f"text that is read ({_measure(scale.text)})"),
        (LEARNED, "text that is learned"),
    )
    for colour, text in entries:
        draw.rectangle((left, top, left + 24, top + 17), fill=colour)
        draw.text((left + 32, top), text, fill=FAINT, font=letters(SMALL))
        left += 58 + round(letters(SMALL).getlength(text))
    for colour, text in ((BARS[0], "a window: its text sees its pictures"), (LINE, "no picture in sight")):
        draw.rounded_rectangle((left, top, left + 24, top + 17), 4, fill=PAPER, outline=colour, width=2)
        draw.text((left + 32, top), text, fill=FAINT, font=letters(SMALL))
        left += 58 + round(letters(SMALL).getlength(text))


def _measure(scale: float) -> str:
    return f"{scale:g} px a token" if scale >= 1 else f"{1 / scale:.0f} tokens a px"


def _drawn(row: Row, scale: Scale, tokenizer: Any) -> Image.Image:
    sample = row.sample
    lines, left_out = _lines(row, scale)
    frame = PICTURES + CELLS + 3 * INSET if sample.pictures else CELLS + 2 * INSET
    more = f" ({left_out:,} of them not drawn)" if left_out else ""
    height = 34 + len(lines) * (frame + GAP) + 30 + 16
    part = Image.new("RGB", (WIDTH, height), SHEET)
    draw = ImageDraw.Draw(part)
    own = BARS[(row.number - 1) % len(BARS)]
    draw.rectangle((PAD, 4, PAD + 5, 24), fill=own)
    facts = (
        f"{counted(len(row.windows), 'window')}{more}, {counted(len(sample.pictures), 'picture')}, "
        f"{counted(sample.image_tokens, 'image token')}, {counted(sample.text_tokens, 'text token')}, "
        f"{sample.learned:,} learned"
    )
    draw.text((WIDTH - PAD, 4), facts, fill=FAINT, font=letters(SMALL), anchor="ra")
    room = WIDTH - 2 * PAD - 40 - round(letters(SMALL).getlength(facts))
    where = f"{row.number}   {replace(sample.origin, path=Path(sample.origin.path).name)}"
    draw.text((PAD + 14, 4), shortened(where, letters(SMALL, True), room), fill=INK, font=letters(SMALL, True))
    top = 34
    for line in lines:
        left = PAD
        for window in line:
            width = _width(window, scale)
            colour = own if window.images else LINE
            draw.rounded_rectangle((left, top, left + width, top + frame), 7, fill=PAPER, outline=colour, width=2)
            _pictures(part, window, sample, scale, (left + INSET, top + INSET))
            cells = top + frame - INSET - CELLS
            _cells(draw, sample.learn[window.text_start : window.text_stop], scale.text, (left + INSET, cells))
            left += width + GAP
        top += frame + GAP
    _said(draw, sample, tokenizer, top)
    return part


def _lines(row: Row, scale: Scale) -> tuple[list[list[Window]], int]:
    """Windows in lines, as many as fit, and how many are left out."""
    lines: list[list[Window]] = [[]]
    used = 0
    for number, window in enumerate(row.windows):
        width = _width(window, scale) + GAP
        if used and used + width > WIDTH - 2 * PAD + GAP:
            if len(lines) == MOST_LINES:
                return lines, len(row.windows) - number
            lines.append([])
            used = 0
        lines[-1].append(window)
        used += width
    return lines, 0


def _width(window: Window, scale: Scale) -> int:
    """px of a window's frame; wide enough that the least of them is seen."""
    _, end = _image_places(window, scale)
    return max(12, round(window.num_text * scale.text), round(end)) + 2 * INSET


def _image_places(window: Window, scale: Scale) -> tuple[list[tuple[float, float]], float]:
    """Left and right of each picture in px: above its text, and never over the one before it."""
    places: list[tuple[float, float]] = []
    end = 0.0
    for image in window.images:
        left = max(end, (image.text_position - window.text_start) * scale.text)
        end = left + max(2.0, (image.stop - image.start) * scale.image)
        places.append((left, end))
    return places, end


def _pictures(part: Image.Image, window: Window, sample: Sample, scale: Scale, at: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(part)
    starts = list(accumulate((sized.tokens for sized in sample.pictures), initial=0))
    for image, (start, end) in zip(window.images, _image_places(window, scale)[0], strict=True):
        left, right = at[0] + round(start), at[0] + round(end)
        box = (left, at[1], max(left, right - 2), at[1] + PICTURES)
        draw.rectangle(box, fill=IMAGE)
        wide = box[2] - box[0]
        if wide >= 16:
            number = bisect_right(starts, image.start) - 1
            seen = open_one(sample.pictures[number].picture, number + 1).convert("RGB")
            # as high as the strip; what is wider than its tokens is cut
            shown = ImageOps.fit(seen, (min(wide, max(1, round(seen.width * PICTURES / seen.height))), PICTURES))
            part.paste(shown, box[:2])
        draw.rectangle(box, outline=ON_IMAGE)
        told = f"{image.stop - image.start:,}"
        if wide >= letters(SMALL).getlength(told) + 10:
            width = round(letters(SMALL).getlength(told)) + 8
            draw.rectangle((box[2] - width, box[3] - 18, box[2], box[3]), fill=ON_IMAGE)
            draw.text((box[2] - 4, box[3] - 17), told, fill=PAPER, font=letters(SMALL), anchor="ra")


def _cells(draw: ImageDraw.ImageDraw, learn: Sequence[bool], size: float, at: tuple[int, int]) -> None:
    left, top = at
    # small cells are drawn as runs: no line would be left between them
    apart = 1 if size >= 4 else 0
    position = 0
    for learned, run in groupby(learn):
        count = sum(1 for _ in run)
        steps = range(position, position + count) if apart else [position]
        for step in steps:
            start, end = left + step * size, left + (step + 1 if apart else position + count) * size
            box = (start, top, max(start, end - 1 - apart), top + CELLS)
            draw.rectangle(box, fill=LEARNED if learned else READ)
        position += count


def _said(draw: ImageDraw.ImageDraw, sample: Sample, tokenizer: Any, top: int) -> None:
    """The beginning of the text as the model gets it; what is learned stands on green."""
    left, position, face = PAD, 0, letters(SMALL)
    for learned, run in groupby(sample.learn):
        count = sum(1 for _ in run)
        # no more is decoded than can be shown
        ids = list(sample.ids[position : position + min(count, 400)])
        text = " ".join(tokenizer.decode(ids).split()) or "·"
        room = WIDTH - PAD - left
        if room < 40:
            return
        text = shortened(text, face, room - 8)
        length = round(face.getlength(text))
        if learned:
            draw.rounded_rectangle((left - 2, top - 2, left + length + 2, top + 19), 4, fill=LEARNED_TEXT)
        draw.text((left, top), text, fill=INK if learned else FAINT, font=face)
        left += length + 8
        position += count


def _line(text: str) -> Image.Image:
    part = Image.new("RGB", (WIDTH, 34), SHEET)
    ImageDraw.Draw(part).text((PAD, 4), text, fill=FAINT, font=letters(SMALL))
    return part
