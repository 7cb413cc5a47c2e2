"""Task `scenes`: 1-4 coloured shapes over a crop of a real photograph; colour, count and place are asked.

Questions, by kind:
    colour "What colour is the star?"     -> "red"            (asked when the picture has one star)
    count  "How many circles are there?"  -> "2"              (or "How many shapes are there?")
    place  "Where is the blue square?"    -> "top left"       (asked when there is one blue square)
    what   "What is at the top left?"     -> "a blue square"  (asked when one shape is there)
Score: `accuracy` is the share of exact answers over all questions; evaluation asks four per scene.

Layout rule: centres keep away from the borders between the ninths of the picture, and from each other by more
than a 28 px cell's diagonal, so that every answer is clear and every shape owns at least one cell.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from casa.errors import UserError
from casa.evaluation.example import Example, QuestionAnswer, Split, as_generator, draw_size
from casa.evaluation.handwriting import grainy, noise

MIN_SIDE, MAX_SIDE = 112, 448
MIN_DIAMETER, MAX_DIAMETER = 34.0, 110.0
MAX_SHAPES = 4
SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 155, 60),
    "blue": (35, 75, 220),
    "yellow": (245, 215, 30),
    "white": (246, 246, 246),
    "black": (18, 18, 20),
}
PLACES = (*("top left", "top", "top right"), *("left", "centre", "right"), *("bottom left", "bottom", "bottom right"))
# real photographs that lie inside scikit-image's wheel, so that nothing is downloaded
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "retina.jpg",
        "rocket.jpg",
        "camera.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "brick.png",
        "grass.png",
        "moon.png",
    ),
    "held_out": ("coffee.png", "motorcycle_left.png", "chelsea.png", "gravel.png"),
}
KINDS = ("colour", "count", "place", "what")
EVALUATION_TURNS = 4

_NAMES = tuple(COLOURS)
_GAP = 6.0  # px between shapes; with the least diameter this makes 40 px, more than a cell's diagonal
_KEEP_OFF = 5.0  # px between a centre and a border of two ninths
_LONGEST = 800  # px kept of a photograph's longer side: crops never need more
_FINE = 3  # shapes are drawn this many times larger, then reduced, for smooth edges


@dataclass(frozen=True)
class SceneShape:
    """One shape: its kind and colour by name, centre and diameter of its circumscribed circle in px."""

    kind: str
    colour: str
    x: float
    y: float
    diameter: float

    def place(self, height: int, width: int) -> int:
        """The ninth of the picture that holds the centre, 0..8 in reading order (an index into PLACES)."""
        return 3 * int(3 * self.y / height) + int(3 * self.x / width)


def scene(
    seed: int | np.random.Generator,
    split: Split = "train",
    *,
    turns: int | Sequence[str] = EVALUATION_TURNS,
    sizes: Sequence[tuple[int, int]] | None = None,
    max_side: int = MAX_SIDE,
) -> Example:
    """Draws one scene.

    Args:
        seed: Any integer, or a generator to draw on.
        split: Which photographs.
        turns: How many questions (each kind that can be asked comes once before any comes again), or their kinds in
            order.
        sizes: (height, width) in px to choose from; by default both sides are drawn evenly from the multiples of 28 in
            112..`max_side`.
        max_side: px.

    Returns:
        The scene, with `shapes` in reading order in its `meta`.
    """
    rng = as_generator("scenes", split, seed)
    height, width = draw_size(rng, sizes, MIN_SIDE, MAX_SIDE, max_side)
    shapes = _place_shapes(height, width, rng)
    image = Image.fromarray(photo_crop(height, width, split, rng))
    for shape in shapes:
        _draw(image, shape, rng)
    noisy = grainy(np.asarray(image), noise(height, width, rng), rng.uniform(0, 8))
    return Example(noisy, _ask(shapes, height, width, turns, rng), {"shapes": shapes})


def _place_shapes(height: int, width: int, rng: np.random.Generator) -> tuple[SceneShape, ...]:
    number = int(rng.integers(1, MAX_SHAPES + 1))
    # a picture often holds several shapes of one kind, or counting would be no task
    kinds = [SHAPES[i] for i in rng.integers(len(SHAPES), size=number)]
    if rng.random() < 0.3:
        kinds = [kinds[0] if rng.random() < 0.6 else kind for kind in kinds]
    largest = min(MAX_DIAMETER, 0.42 * min(height, width))
    shapes: list[SceneShape] = []
    for kind in kinds:
        colour = _NAMES[rng.integers(len(_NAMES))]
        for _ in range(60):
            diameter = MIN_DIAMETER * (largest / MIN_DIAMETER) ** rng.random()
            reach = diameter / 2 + 2
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            if not (_clear(x, width) and _clear(y, height)):
                continue
            if all(math.hypot(x - other.x, y - other.y) >= (diameter + other.diameter) / 2 + _GAP for other in shapes):
                shapes.append(SceneShape(kind, colour, x, y, diameter))
                break
    # reading order: by third of the height, then from the left
    return tuple(sorted(shapes, key=lambda shape: (int(3 * shape.y / height), shape.x)))


def _clear(at: float, side: int) -> bool:
    return min(abs(at - side / 3), abs(at - 2 * side / 3)) >= _KEEP_OFF


def _corners(kind: str, centre: float, radius: float, turn: float) -> list[tuple[float, float]]:
    if kind == "star":
        radii, angles = [radius, 0.45 * radius] * 5, np.arange(10) * (math.pi / 5)
    elif kind == "square":
        radii, angles = [radius] * 4, np.arange(4) * (math.pi / 2) + math.pi / 4
    else:
        radii, angles = [radius] * 3, np.arange(3) * (2 * math.pi / 3)
    return [
        (centre + r * math.sin(angle), centre - r * math.cos(angle))
        for r, angle in zip(radii, (angles + turn).tolist(), strict=True)
    ]


def _draw(image: Image.Image, shape: SceneShape, rng: np.random.Generator) -> None:
    """Paint the shape with a thin rim, light on dark colours and dark on light ones: it shows anywhere."""
    fill = np.clip(np.array(COLOURS[shape.colour]) + rng.uniform(-14, 14, 3), 0, 255)
    rim = 235 if shape.colour in ("red", "blue", "black") else 25
    turn = math.radians(rng.uniform(-12, 12))
    side = math.ceil(shape.diameter) + 2
    left, top = round(shape.x - side / 2), round(shape.y - side / 2)
    middle, outer = side * _FINE / 2, shape.diameter / 2 * _FINE
    # corners of polygons take more off the radius for a rim of the same width
    inner = outer - (2.0 if shape.kind == "circle" else 3.5) * _FINE
    for radius, colour in ((outer, (rim, rim, rim)), (inner, tuple(int(v) for v in fill))):
        mask = Image.new("L", (side * _FINE, side * _FINE))
        draw = ImageDraw.Draw(mask)
        if shape.kind == "circle":
            draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=255)
        else:
            draw.polygon(_corners(shape.kind, middle, radius, turn), fill=255)
        image.paste(colour, (left, top), mask.reduce(_FINE))


@cache
def _photo(name: str) -> Image.Image:
    try:
        import skimage
    except ImportError as error:
        raise UserError("The scenes need scikit-image's photographs: pip install 'casa-vlm[tasks]'.") from error
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise UserError(f"This scikit-image has no {name}; install scikit-image 0.24 or later.")
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((_LONGEST, _LONGEST))
    return photo


def photo_crop(height: int, width: int, split: Split, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random crop of one of the split's photographs, in varied light: (height, width, 3)."""
    names = PHOTOS[split]
    photo = _photo(names[rng.integers(len(names))])
    # shown at 0.6 to 1.6 times its size, or larger where it would not cover the picture
    largest = min(photo.width / width, photo.height / height)
    share = min(largest, rng.uniform(0.6, 1.6))
    # min: rounding must not reach past the photograph's edge
    w, h = min(share * width, photo.width), min(share * height, photo.height)
    x, y = rng.random() * (photo.width - w), rng.random() * (photo.height - h)
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, bias = rng.uniform(0.6, 1.05), rng.uniform(-15, 35)
    light = np.clip(np.arange(256) * gain + bias, 0, 255).astype(np.uint8)
    return light[np.asarray(crop)]


def _ask(
    shapes: Sequence[SceneShape], height: int, width: int, turns: int | Sequence[str], rng: np.random.Generator
) -> tuple[QuestionAnswer, ...]:
    askable = _askable(shapes, height, width)
    if isinstance(turns, int):
        kinds: list[str] = []
        while len(kinds) < turns:
            kinds += rng.permutation([kind for kind in KINDS if askable[kind]]).tolist()
        kinds = kinds[:turns]
    else:
        kinds = list(turns)
        for kind in kinds:
            if kind not in askable:
                raise ValueError(f"{kind!r} is no kind of scene question; choose {', '.join(KINDS)}.")
        # a kind that this picture does not allow gives way to counting, which is always possible
        kinds = [kind if askable[kind] else "count" for kind in kinds]
    return tuple(askable[kind][rng.integers(len(askable[kind]))] for kind in kinds)


def _askable(shapes: Sequence[SceneShape], height: int, width: int) -> dict[str, list[QuestionAnswer]]:
    """Every question with a clear answer, by kind."""
    kinds = [shape.kind for shape in shapes]
    looks = [(shape.colour, shape.kind) for shape in shapes]
    places = [shape.place(height, width) for shape in shapes]
    found: dict[str, list[QuestionAnswer]] = {kind: [] for kind in KINDS}
    for shape, place in zip(shapes, places, strict=True):
        if kinds.count(shape.kind) == 1:
            found["colour"].append(QuestionAnswer(f"What colour is the {shape.kind}?", shape.colour, "colour"))
        if looks.count((shape.colour, shape.kind)) == 1:
            found["place"].append(QuestionAnswer(f"Where is the {shape.colour} {shape.kind}?", PLACES[place], "place"))
        if places.count(place) == 1:
            answer = f"a {shape.colour} {shape.kind}"
            found["what"].append(QuestionAnswer(f"What is at the {PLACES[place]}?", answer, "what"))
    found["count"] = [
        QuestionAnswer(f"How many {kind}s are there?", str(kinds.count(kind)), "count") for kind in SHAPES
    ]
    found["count"] += [QuestionAnswer("How many shapes are there?", str(len(shapes)), "count")] * 2
    return found
