"""Letters and words in pictures of data: DejaVu where matplotlib has brought it, so that most scripts can be read."""

from bisect import bisect_right
from functools import lru_cache

from PIL import ImageFont

from casa.media.drawing import dejavu


@lru_cache(maxsize=8)
def letters(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, or Pillow's own face (letters of ASCII) without it. size: px."""
    if (file := dejavu(bold)) is not None:
        return ImageFont.truetype(str(file), size)
    face = ImageFont.load_default(size)
    assert isinstance(face, ImageFont.FreeTypeFont)
    return face


def shortened(text: str, face: ImageFont.FreeTypeFont, width: int, always: bool = False) -> str:
    """The text, or its beginning and "…" where it is wider than `width` px; `always` marks it as cut anyway."""
    if face.getlength(text) <= width and not always:
        return text
    kept = bisect_right(range(1, len(text) + 1), width, key=lambda n: face.getlength(text[:n] + "…"))
    return text[:kept].rstrip() + "…"


PAPER, SHEET, LINE = "#FFFFFF", "#F3F4F6", "#DADDE2"
INK, FAINT = "#1F2430", "#7A8190"
# Okabe and Ito's colours, told apart by all readers
BARS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
