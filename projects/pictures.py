"""The docs' own drawings and the README's moving picture: `python -m projects.pictures`.

Drawings are SVG and follow the reader's light or dark page. Masks are those of `WindowLayout`, so they cannot lie. The
moving picture is `casa-tiny` watching the demo's film, with the captions that it says.
"""

import argparse
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

import casa
from casa import WindowLayout
from casa.media import open_source
from casa.streaming import Usage

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2937 } .b { font-weight: 600 } .s { font-size: 11.5px; fill: #596273 }
.i { fill: #2f7d6d } .t { fill: #c9853a } .e { fill: #e8ebef } .l { fill: none; stroke: #8a93a3; stroke-width: 1.2 }
.w { fill: #2f7d6d18; stroke: #2f7d6d; stroke-width: 1.2 } .f { opacity: .32 } .o { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #e4e7ec } .s { fill: #a6afbd } .e { fill: #343a46 }
.i { fill: #4db59f } .w { fill: #4db59f20; stroke: #4db59f } .t { fill: #e0a458 } .o { fill: #14171c } }
</style>"""
CELL = 15
# two frames of three tokens, with three words before, between and after them
LENGTHS, PLACES = [9], [[(3, 3), (6, 3)]]


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join(parts)
    return f'{head} role="img" aria-label="{title}">\n{STYLE}\n{body}\n</svg>\n'


def words(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{text}</text>'


def square(x: float, y: float, kind: str, size: float = CELL - 2) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="2" class="{kind}"/>'


def grid(x: float, y: float, mask: torch.Tensor, kinds: str) -> list[str]:
    """A mask's cells, in the colour of what their column is: `kinds` has i or t for each."""
    return [
        square(x + CELL * column, y + CELL * row, kinds[column] if seen else "e")
        for row, line in enumerate(mask.tolist())
        for column, seen in enumerate(line)
    ]


def masks() -> str:
    """What each token may look at, in insertion, cross-attention and CASA: columns are keys, rows are queries."""
    layout = WindowLayout.from_insertions(LENGTHS, PLACES)
    everything = WindowLayout.from_insertions(LENGTHS, PLACES, history=-1)
    images, text = layout.num_image, layout.num_text
    order = "tttiiitttiiittt"
    causal = torch.ones(len(order), len(order), dtype=torch.bool).tril()
    top, left = 62, 24
    parts = [words(left, 22, "Insertion", "b"), words(left, 40, "one mask; images are queries too", "s")]
    parts += grid(left, top, causal, order)
    x = left + CELL * len(order) + 44
    parts += [words(x, 22, "Cross-attention", "b"), words(x, 40, "text looks at images", "s")]
    parts += grid(x, top, everything.mask()[:, :images], "i" * images)
    x += CELL * images + 44
    parts += [words(x, 22, "CASA", "b"), words(x, 40, "text looks at its window: images and text, one softmax", "s")]
    parts += grid(x, top, layout.mask(), "i" * images + "t" * text)
    under = top + CELL * text + 24
    x = left + CELL * len(order) + 44
    parts += [words(x, under, "Both stand beside self-attention over the text, which is as it was.", "s")]
    parts += [square(x, under + 16, "i"), words(x + 20, under + 27, "image token", "s")]
    parts += [square(x + 110, under + 16, "t"), words(x + 130, under + 27, "text token", "s")]
    parts += [square(x + 210, under + 16, "e"), words(x + 230, under + 27, "not looked at", "s")]
    return svg(752, 300, "Masks of insertion, cross-attention and CASA", parts)


def lane(x: float, y: float, kinds: str) -> list[str]:
    return [square(x + 17 * place, y, kind) for place, kind in enumerate(kinds) if kind != " "]


def streams() -> str:
    """Where the tokens of two frames live, by method."""
    parts = [words(24, 24, "Insertion", "b"), words(24, 42, "Image tokens stand in the text,", "s")]
    parts += [
        words(24, 57, "in every layer and in the cache,", "s"),
        words(24, 72, "for as long as the text does.", "s"),
    ]
    parts += lane(250, 40, "ttiiiitttiiiittt")
    parts += [
        f'<path class="l" d="M250 62v6h{17 * 16 - 4}v-6"/>',
        words(250, 84, "the cache: 16 tokens of two frames", "s"),
    ]
    parts += [words(24, 124, "Cross-attention", "b"), words(24, 142, "Text asks images in layers of", "s")]
    parts += [words(24, 157, "their own, and images alone.", "s")]
    parts += lane(250, 122, "  iiii   iiii   ") + lane(250, 158, "tt    ttt    ttt")
    parts += [f'<path class="l" d="M{x} 156L{y} 138"/>' for x, y in ((358, 310), (375, 320), (477, 429), (494, 438))]
    parts += [words(250, 190, "the cache: 8 tokens of text", "s")]
    parts += [words(24, 234, "CASA", "b"), words(24, 252, "Text asks the images and the text", "s")]
    parts += [
        words(24, 267, "of its window, in one softmax. The", "s"),
        words(24, 282, "next frame opens a new window.", "s"),
    ]
    for x, kind in ((279, "w f"), (398, "w")):
        parts += [f'<rect x="{x}" y="226" width="116" height="64" rx="7" class="{kind}"/>']
    parts += [f'<g class="f">{"".join(lane(250, 236, "  iiii"))}</g>']
    parts += lane(250, 236, "         iiii") + lane(250, 268, "tt    ttt    ttt")
    parts += [words(250, 312, "the cache: 8 tokens of text; of the images, those of the last frame", "s")]
    return svg(640, 330, "Where image tokens live in insertion, cross-attention and CASA", parts)


def placements() -> str:
    """The three places of a CASA layer in a block."""
    parts: list[str] = []
    blocks = (
        ("CASA⊕ parallel", "added beside", ((2, 92, "SA", "t"), (102, 92, "CASA", "i"), (52, 160, "FFN", "t"))),
        ("CASA→ before", "a step of its own", ((52, 70, "CASA", "i"), (52, 116, "SA", "t"), (52, 162, "FFN", "t"))),
        ("CASA∨ replace", "instead, in some blocks", ((52, 92, "CASA", "i"), (52, 160, "FFN", "t"))),
    )
    for number, (name, told, boxes) in enumerate(blocks):
        x = 24 + 232 * number
        parts += [words(x, 22, name, "b"), words(x, 40, told, "s"), f'<path class="l" d="M{x + 90} 58V222"/>']
        if number == 0:
            parts += [f'<path class="l" d="M{x + 90} 72H{x + 40}V142H{x + 140}V72z"/>']
        for dx, y, label, kind in boxes:
            parts += [f'<rect x="{x + dx}" y="{y}" width="76" height="30" rx="6" class="{kind}"/>']
            parts += [f'<text x="{x + dx + 38}" y="{y + 20}" text-anchor="middle" class="o">{label}</text>']
    return svg(720, 236, "CASA beside, before or instead of self-attention", parts)


DRAWINGS = {"masks.svg": masks, "streams.svg": streams, "placements.svg": placements}
FILM = Path(casa.__file__).parent / "assets" / "demo" / "clip.mp4"
SHOWN_FPS, WATCHED = 6, 3  # frames shown a second; one of so many is watched
KEPT = 128  # text tokens
PAPER, INK, QUIET, HUE = (250, 250, 248), (31, 41, 55), (110, 118, 132), (47, 125, 109)


def moving(seconds: float) -> Iterator[Image.Image]:
    """Frames of `casa-tiny` captioning the demo's film, with what it said and what it keeps beside them."""
    eyes = casa.load("casa-tiny")
    with open_source(FILM, fps=SHOWN_FPS, end=seconds) as frames:
        yield from watched("casa-tiny", eyes, ((frame.image, frame.time) for frame in frames), WATCHED)


def watched(
    name: str,
    eyes: casa.CasaPipeline,
    frames: Iterable[tuple[Image.Image, float]],
    every: int = 1,
    box: tuple[int, int] = (336, 336),
    panel: int = 264,
) -> Iterator[Image.Image]:
    """Frames with what a model said of them so far, and what it keeps, beside them.

    Args:
        frames: Pictures and their times in seconds.
        every: One of so many is watched.
        box: Width and height in px that a picture is fitted into.
        panel: Width of what stands beside it.
    """
    session = eyes.stream(max_text_tokens=KEPT)
    said: list[tuple[float, str]] = []
    for number, (picture, time) in enumerate(frames):
        if number % every == 0 and (text := session.step(picture)):
            said.append((time, text))
        sheet = Image.new("RGB", (box[0] + panel, box[1]), PAPER)
        fitted = ImageOps.contain(picture, box)
        sheet.paste(fitted, (0, (box[1] - fitted.height) // 2))
        _tell(ImageDraw.Draw(sheet), box, panel, f"{name}, live on a CPU", time, said, session.usage)
        yield sheet


def _tell(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int],
    panel: int,
    title: str,
    time: float,
    said: list[tuple[float, str]],
    usage: Usage,
) -> None:
    left, rows = box[0] + 24, (box[1] - 160) // 25
    draw.text((left, 20), title, INK, font_size=17)
    draw.text((left, 46), f"{time:5.1f} s of film", QUIET, font_size=14)
    lines = []
    for moment, text in said:
        first, *more = textwrap.wrap(text, (panel - 88) // 8)
        lines += [(f"{moment:4.1f} s", first, moment), *(("", part, moment) for part in more)]
    for row, (moment, text, at) in enumerate(lines[-rows:]):
        draw.text((left, 80 + 25 * row), moment, QUIET, font_size=15)
        draw.text((left + 64, 80 + 25 * row), text, HUE if at == said[-1][0] else INK, font_size=17)
    draw.text((left, box[1] - 64), f"image tokens kept   {usage.image_tokens}", INK, font_size=14)
    draw.text((left, box[1] - 42), f"text tokens kept     {usage.text_tokens} of {KEPT}", INK, font_size=14)


def save_moving(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    """Writes frames as a moving WebP."""
    first, *rest = frames
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=60, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--seconds", type=float, default=20, help="length of the moving picture; 0 for none")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        (given.out / name).write_text(draw(), encoding="utf-8")
    if given.seconds:
        save_moving(moving(given.seconds), given.out / "live.webp", SHOWN_FPS)


if __name__ == "__main__":
    main()
