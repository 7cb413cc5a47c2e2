"""Captions drawn into pictures: white text on a half-transparent band at the foot of the picture.

Letters are those of Pillow's built-in font, which is ASCII only. Other text is set in DejaVu Sans where matplotlib
(which carries it) is installed, and else loses its accents.
"""

import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from casa.errors import UserError
from casa.media.pictures import check_picture

# Letter height over the picture's shorter side, and the smallest that can still be read, in pixels.
LETTER = 0.075
SMALLEST = 11
# What part of the height the band may cover before the text is cut with "...".
COVER = 0.6
INK = (255, 255, 255, 255)
BAND = (0, 0, 0, 160)
_PUNCTUATION = str.maketrans("‘’‚“”„«»–—−", '\'\'\'"""""---')


def draw_caption(image: Image.Image, text: str) -> Image.Image:
    """Draws `text` at the foot of a copy of `image`; without text, the copy is plain.

    Long text is wrapped, then set smaller, then cut with "...": the band never covers more than `COVER` of the height,
    except where one line of the smallest letters needs it.

    Args:
        image: A picture of any mode.
        text: What is drawn.

    Returns:
        A picture of mode RGB.

    Raises:
        UserError: The picture is refused by `check_picture`, or Pillow has no FreeType.
    """
    picture = check_picture(image)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    text = "\n".join(line for line in lines if line)
    if text:
        band = _band(picture.width, picture.height, *_settable(text))
        picture.paste(band, (0, picture.height - band.height), band)
    return picture


def dejavu(bold: bool = False) -> Path | None:
    """The file of DejaVu Sans, which has the letters of most scripts; None where matplotlib is not installed."""
    matplotlib = find_spec("matplotlib")  # found, not imported: only its font files are wanted
    if matplotlib is None or matplotlib.origin is None:
        return None
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    return file if file.is_file() else None


@lru_cache(maxsize=8)
def _band(width: int, height: int, text: str, font: str | None) -> Image.Image:
    """The band with its text, RGBA, `width` wide. Kept, since a caption stays for many frames."""
    size = max(SMALLEST, round(min(width, height) * LETTER))
    while True:
        face = _face(size, font)
        pad = max(1, size // 3)
        step = sum(face.getmetrics())
        lines = _wrap(text, face, width - 2 * pad)
        room = max(1, int((height * COVER - 2 * pad) // step))
        if len(lines) <= room or size <= SMALLEST:
            break
        size = max(SMALLEST, int(size * 0.85))
    if len(lines) > room:
        lines = [*lines[: room - 1], _shorten(lines[room - 1], face, width - 2 * pad)]
    band = Image.new("RGBA", (width, min(height, len(lines) * step + 2 * pad)), BAND)
    draw = ImageDraw.Draw(band)
    for i, line in enumerate(lines):
        left = (width - face.getlength(line)) / 2
        draw.text((left, pad + i * step), line, font=face, fill=INK)
    return band


def _settable(text: str) -> tuple[str, str | None]:
    """The text, and the file of a font that has its letters; None for Pillow's own."""
    if text.isascii():
        return text, None
    if (file := dejavu()) is not None:
        return text, str(file)
    plain = text.translate(_PUNCTUATION)
    plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode("ascii"), None


@lru_cache(maxsize=32)
def _face(size: int, font: str | None) -> ImageFont.FreeTypeFont:
    face = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
    if not isinstance(face, ImageFont.FreeTypeFont):
        raise UserError("This Pillow was built without FreeType: install Pillow's own wheel.")
    return face


def _wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at blanks, and inside a word only where it fills a line."""
    wrapped: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if face.getlength(longer) <= width:
                line = longer
                continue
            if line:
                wrapped.append(line)
            while len(word) > 1 and face.getlength(word) > width:
                cut = next((n for n in range(len(word) - 1, 1, -1) if face.getlength(word[:n]) <= width), 1)
                wrapped.append(word[:cut])
                word = word[cut:]
            line = word
        wrapped.append(line)
    return wrapped


def _shorten(line: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    while line and face.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."
