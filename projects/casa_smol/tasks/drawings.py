"""Emoji named, in four styles, and easy-VQA's shapes.

One style is drawn in evaluation alone, and so is one name of ten. Pictures are SVG, drawn by the browser.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache

from numpy.random import Generator
from PIL import Image

from projects.casa_smol.fetch import folder_of
from projects.casa_smol.tasks.asked import Turn, some, turn
from projects.casa_smol.tasks.documents import Drawing
from projects.casa_smol.tasks.html import Html
from projects.casa_smol.words import is_held_out, pick

STYLES = ("noto", "fluent-emoji-flat", "twemoji", "openmoji")
HELD_OUT_STYLE = "openmoji"
# variants of another name, and names that say nothing of what is drawn
SKIPPED = (
    "skin-tone",
    "flag-",
    "regional",
    "keycap",
    "-button",
    "light-",
    "medium-",
    "dark-",
    "component",
    "-hair",
    "clock-",
    "-oclock",
    "-thirty",
)
NAME = ("What is this?", "What does the picture show?", "What is drawn here?", "Name the drawing.", "What do you see?")
PLACES = {2: ("left", "right"), 4: ("top left", "top right", "bottom left", "bottom right")}
AT = ("What is at the {place}?", "What is drawn at the {place}?", "Which drawing is at the {place}?")
WHERE = ("Where is the {name}?", "At which place is the {name}?")


@lru_cache(maxsize=1)
def styles() -> dict[str, dict[str, str]]:
    """SVG by name, of each style, for the names that two styles or more have."""
    every = {}
    for style in STYLES:
        told = json.loads((folder_of("npm", f"@iconify-json/{style}") / "icons.json").read_text())
        every[style] = {
            name: _svg(told | icon)
            for name, icon in told["icons"].items()
            if len(name) > 2 and not any(part in name for part in SKIPPED)
        }
    shared = {name for name in every["noto"] if sum(name in own for own in every.values()) > 1}
    return {style: {name: own[name] for name in sorted(shared & own.keys())} for style, own in every.items()}


def _svg(icon: dict) -> str:
    box = f"0 0 {icon.get('width', 16)} {icon.get('height', 16)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def shown(name: str) -> str:
    """ "hot dog" for "hot-dog"."""
    return name.replace("-", " ")


def _one(rng: Generator, split: str) -> tuple[str, str]:
    """A name and its SVG. Held out: the style never seen with any name, or a seen style with a name never seen."""
    if split == "train":
        style = pick(rng, [style for style in STYLES if style != HELD_OUT_STYLE])
        names = [name for name in styles()[style] if not is_held_out(name)]
    elif rng.random() < 0.6:
        style, names = HELD_OUT_STYLE, list(styles()[HELD_OUT_STYLE])
    else:
        style = pick(rng, [style for style in STYLES if style != HELD_OUT_STYLE])
        names = [name for name in styles()[style] if is_held_out(name)]
    name = pick(rng, names)
    return name, styles()[style][name]


def image(svg: str, side: int, transform: str = "none") -> str:
    """A drawing of `side` px as HTML has it."""
    data = base64.b64encode(svg.encode()).decode()
    style = f"width: {side}px; height: {side}px; transform: {transform}"
    return f'<img src="data:image/svg+xml;base64,{data}" style="{style}">'


def laid_out(rng: Generator, svgs: Sequence[str]) -> Html:
    """One drawing, or two or four side by side: somewhat turned, some mirrored, on white or on a colour."""
    count = len(svgs)
    side = int(rng.integers(72, 225) if count == 1 else rng.integers(64, 140))
    images = "".join(
        image(svg, side, f"rotate({rng.normal(0, 5):.1f}deg) scaleX({pick(rng, (1, 1, 1, -1))})") for svg in svgs
    )
    across = 1 if count == 1 else 2
    gap, edge = int(rng.integers(4, 30)), int(rng.integers(4, 40))
    paper = "#fff" if rng.random() < 0.5 else "#" + "".join(f"{int(v):02x}" for v in rng.integers(90, 256, 3))
    grid = f"display: grid; grid-template-columns: repeat({across}, {side}px); gap: {gap}px"
    css = f"background: {paper}; padding: {edge}px; {grid}"
    return Html(images, css, across * side + (across - 1) * gap + 2 * edge)


def drawing(rng: Generator, split: str) -> Drawing:
    """Drawings with questions: their names, their places, how many they are."""
    count = int(pick(rng, (1, 1, 1, 2, 4)))
    found: dict[str, str] = {}
    while len(found) < count:
        name, svg = _one(rng, split)
        found[name] = svg
    html = laid_out(rng, list(found.values()))
    names = [shown(name) for name in found]
    if count == 1:
        return html, (turn(rng, NAME, names[0]),)
    ask: list[Turn] = [turn(rng, ("How many drawings are there?", "How many pictures are shown?"), count)]
    for place, name in zip(PLACES[count], names, strict=True):
        ask.append(turn(rng, AT, name, place=place))
        ask.append(turn(rng, WHERE, place, f"at the {place}", name=name))
    return html, some(rng, ask, 5)


def easy_vqa(split: str) -> Iterator[tuple[Image.Image, tuple[Turn, ...]]]:
    """The pictures of easy-VQA in their order, with all their questions; "held_out" is its official test."""
    folder = folder_of("pip", "easy-vqa") / "easy_vqa" / "data" / ("test" if split == "held_out" else "train")
    asked: dict[int, list[Turn]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        asked.setdefault(number, []).append(Turn(question, (answer,)))
    for number in sorted(asked):
        with Image.open(folder / "images" / f"{number}.png") as image:
            yield image.convert("RGB"), tuple(asked[number])
