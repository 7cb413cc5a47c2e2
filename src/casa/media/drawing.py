"""Captions drawn into pictures: white text on a half-transparent band at the foot of the picture.

Letters are those of Pillow's built-in font, which is ASCII only. Other text is set in DejaVu Sans where
matplotlib (which carries it) is installed, and else loses its accents; `font` names any other TrueType file.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from casa.errors import UserError
from casa.media.fonts import dejavu
from casa.media.pictures import check_picture
from casa.media.pictures_source import FolderSource
from casa.media.source import Source
from casa.media.subtitles import Caption, tidy
from casa.media.upright import resized
from casa.media.video import read_frames
from casa.media.video_writer import VideoWriter

# Letter height over the picture's shorter side, and the smallest that can still be read, in pixels.
LETTER = 0.075
SMALLEST = 11
# What part of the height the band may cover before the text is cut with "...".
COVER = 0.6
INK = (255, 255, 255, 255)
BAND = (0, 0, 0, 160)
_PUNCTUATION = str.maketrans("‘’‚“”„«»–—−", '\'\'\'"""""---')


def draw_caption(image: Image.Image, text: str, font: str | os.PathLike[str] | None = None) -> Image.Image:
    """A copy of `image` (any mode; returned as RGB) with `text` at its foot; without text, a plain copy.

    Long text is wrapped, then set smaller, then cut with "...": the band never covers more than `COVER`
    of the height, except where one line of the smallest letters needs it.

    Raises:
        UserError: `font` is no font file.
        TypeError, ValueError: see `casa.media.pictures.check_picture`.
    """
    picture = check_picture(image)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    text = "\n".join(line for line in lines if line)
    if text:
        text, font = _settable(text, None if font is None else os.fspath(font))
        band = _band(picture.width, picture.height, text, font)
        picture.paste(band, (0, picture.height - band.height), band)
    return picture


def burn_captions(
    source_path: str | os.PathLike[str],
    captions: Iterable[Caption],
    out_path: str | os.PathLike[str],
    progress: Callable[[int, int | None], None] | None = None,
    font: str | os.PathLike[str] | None = None,
    crf: int = 23,
    fps: float = 2.0,
) -> None:
    """Write the video at `source_path` again, with each caption drawn in at its time, and without sound.

    Size, upright rotation and the time of every frame (variable frame rate too) are kept; an odd side
    grows by one pixel, and the last frame lasts one average frame. `out_path`
    may be `source_path`: it is replaced when all is done, and stays as it is if anything fails.
    `progress(frames done, frames in all or None)` is called after each frame.
    Of a folder, all pictures become a video at `fps`, in the size of the first.

    Raises:
        UserError: a source that cannot be read, or a destination that cannot be written.
    """
    cues = tidy(captions)
    current = 0
    frames, size, rate, total = _to_draw_on(source_path, fps)
    with frames, VideoWriter(out_path, size, rate, crf=crf) as video:
        for frame in frames:
            while current < len(cues) and cues[current].end <= frame.time:
                current += 1
            shown = current < len(cues) and cues[current].start <= frame.time
            image = Image.fromarray(resized(frame.picture, *size))
            if shown:
                image = draw_caption(image, cues[current].text, font)
            time = max(frame.time, 0.0)
            if not frame.index and time > 0:
                # the first picture is there from the beginning, or players would take its time for the beginning
                video.write(Image.fromarray(resized(frame.picture, *size)), time=0.0)
            video.write(image, time=time)
            if progress is not None:
                progress(frame.index + 1, total)


def _to_draw_on(path: str | os.PathLike[str], fps: float) -> tuple[Source, tuple[int, int], float, int | None]:
    """The frames of a video file or of a folder's pictures, their (width, height), rate, and how many there are."""
    if os.path.isdir(path):
        with FolderSource(path, fps) as pictures:
            first = next(pictures, None)
        if first is None:
            raise UserError(f"{path} holds no picture that can be read: check its files.")
        return FolderSource(path, fps), first.image.size, fps, len(pictures.paths)
    frames = read_frames(path, fps=None)
    info = frames.info
    rate = float(Fraction(info.fps).limit_denominator(1001)) if 0 < info.fps <= 1000 else 25.0
    return frames, (info.width, info.height), rate, info.frames


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


def _settable(text: str, font: str | None) -> tuple[str, str | None]:
    """The text, and a font that has its letters."""
    if font is not None or text.isascii():
        return text, font
    if (file := dejavu()) is not None:
        return text, str(file)
    plain = text.translate(_PUNCTUATION)
    plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode("ascii"), None


@lru_cache(maxsize=32)
def _face(size: int, font: str | None) -> ImageFont.FreeTypeFont:
    try:
        face = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
    except OSError as error:
        raise UserError(f"{font} is not a font that can be read: name a .ttf or .otf file.") from error
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
