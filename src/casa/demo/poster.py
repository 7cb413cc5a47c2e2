"""One picture of a whole demo run: captioned frames on top, memory and attention below. The README shows it."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from casa.atomic import replacing
from casa.media import draw_caption

WIDTH = 1350
GAP = 12
STILLS = 4


def write_poster(path: Path, stills: Sequence[tuple[Image.Image, str]], plots: Sequence[Path]) -> None:
    """Up to four stills (picture, what was said about it) side by side over the plots, all `WIDTH` px wide.

    Raises UserError if `path` cannot be written.
    """
    rows: list[Image.Image] = []
    if stills:
        side = (WIDTH - (STILLS - 1) * GAP) // STILLS
        shown = [_still(picture, text, side) for picture, text in stills[:STILLS]]
        strip = Image.new("RGB", (WIDTH, max(still.height for still in shown)), "white")
        for number, still in enumerate(shown):
            strip.paste(still, (number * (side + GAP), 0))
        rows.append(strip)
    for plot in plots:
        with Image.open(plot) as opened:
            rows.append(_fitted(opened.convert("RGB"), WIDTH))
    sheet = Image.new("RGB", (WIDTH, sum(row.height + GAP for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    with replacing(path) as unfinished:
        sheet.quantize(192).save(unfinished, "PNG", optimize=True)


def _still(picture: Image.Image, text: str, side: int) -> Image.Image:
    """The picture with its caption beneath, where it hides nothing."""
    fitted = _fitted(picture.convert("RGB"), side)
    roomy = Image.new("RGB", (side, fitted.height + side // 7), "black")
    roomy.paste(fitted)
    return draw_caption(roomy, text)


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    height = round(picture.height * width / picture.width)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
