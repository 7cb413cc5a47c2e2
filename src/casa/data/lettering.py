"""Letters in pictures of data: DejaVu where matplotlib has brought it, so that most scripts can be read."""

from bisect import bisect_right
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont


@lru_cache(maxsize=8)
def letters(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, or Pillow's own face (letters of ASCII) without it. size: px."""
    matplotlib = find_spec("matplotlib")  # found, not imported: only its font files are wanted
    if matplotlib is not None and matplotlib.origin is not None:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        file = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if file.is_file():
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
