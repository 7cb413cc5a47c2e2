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

import numpy as np
from PIL import Image, ImageDraw

from casa.evaluation.example import (
    CELL,
    DenseTargets,
    Example,
    Split,
    Turn,
    draw_size,
    empty_dense,
    own_cells,
)
from casa.evaluation.paper import grainy, noise
from casa.evaluation.photos import photo_crop
from casa.evaluation.seeds import as_generator

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
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
KINDS = ("colour", "count", "place", "what")
EVALUATION_TURNS = 4

_NAMES = tuple(COLOURS)
_GAP = 6.0  # px between shapes; with the least diameter this makes 40 px, more than a cell's diagonal
_KEEP_OFF = 5.0  # px between a centre and a border of two ninths
_OWNED = 0.3
_FINE = 3  # shapes are drawn this many times larger, then reduced, for smooth edges


@dataclass(frozen=True)
class Shape:
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
    """Draw one scene.

    seed: any integer, or a generator to draw on. split: which photographs. turns: how many questions (each
    kind that can be asked comes once before any comes again), or their kinds in order. sizes: (height, width)
    in px to choose from; by default both sides are drawn evenly from the multiples of 28 in 112..max_side.
    `meta` holds `shapes`, in reading order.
    """
    rng = as_generator("scenes", split, seed)
    height, width = draw_size(rng, sizes, MIN_SIDE, MAX_SIDE, max_side)
    shapes = _place_shapes(height, width, rng)
    image = Image.fromarray(photo_crop(height, width, split, rng))
    for shape in shapes:
        _draw(image, shape, rng)
    return Example(
        image=grainy(np.asarray(image), noise(height, width, rng), rng.uniform(0, 8)),
        turns=_ask(shapes, height, width, turns, rng),
        dense=scene_targets(shapes, height, width),
        meta={"shapes": shapes},
    )


def scene_targets(shapes: Sequence[Shape], height: int, width: int) -> DenseTargets:
    """Dense targets of a scene of `height` x `width` px; `shapes` must be in reading order."""
    targets = empty_dense(height, width)
    if not shapes:
        return targets
    centres = np.array([(shape.x, shape.y) for shape in shapes])
    radii = np.array([[_half_extent(shape)] for shape in shapes])
    boxes = np.concatenate([centres - radii, centres + radii], axis=1)
    owner = own_cells(boxes, centres, height // CELL, width // CELL, _OWNED)
    kinds = [shape.kind for shape in shapes]
    facts = {
        "shape": [SHAPES.index(kind) + 1 for kind in kinds],
        "colour": [_NAMES.index(shape.colour) + 1 for shape in shapes],
        "ordinal": [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)],
        "count": [kinds.count(kind) for kind in kinds],
        "ordinal_all": list(range(1, len(shapes) + 1)),
        "shapes": [len(shapes)] * len(shapes),
        "place": [shape.place(height, width) + 1 for shape in shapes],
    }
    covered = owner >= 0
    for name, values in facts.items():
        targets[name][covered] = np.array(values)[owner[covered]]
    columns, rows = (centres // CELL).astype(int).T
    targets["centre"][rows, columns] = 1
    return targets


def _half_extent(shape: Shape) -> float:
    # the box that a shape of this kind fills, about; triangles and stars leave the corners of theirs empty
    return shape.diameter / 2 * {"circle": 0.95, "square": 0.8, "triangle": 0.75, "star": 0.75}[shape.kind]


def _place_shapes(height: int, width: int, rng: np.random.Generator) -> tuple[Shape, ...]:
    number = int(rng.integers(1, MAX_SHAPES + 1))
    # a picture often holds several shapes of one kind, or counting would be no task
    kinds = [SHAPES[i] for i in rng.integers(len(SHAPES), size=number)]
    if rng.random() < 0.3:
        kinds = [kinds[0] if rng.random() < 0.6 else kind for kind in kinds]
    largest = min(MAX_DIAMETER, 0.42 * min(height, width))
    shapes: list[Shape] = []
    for kind in kinds:
        colour = _NAMES[rng.integers(len(_NAMES))]
        for _ in range(60):
            diameter = MIN_DIAMETER * (largest / MIN_DIAMETER) ** rng.random()
            reach = diameter / 2 + 2
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            if not (_clear(x, width) and _clear(y, height)):
                continue
            if all(math.hypot(x - other.x, y - other.y) >= (diameter + other.diameter) / 2 + _GAP for other in shapes):
                shapes.append(Shape(kind, colour, x, y, diameter))
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


def _draw(image: Image.Image, shape: Shape, rng: np.random.Generator) -> None:
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


def _ask(
    shapes: Sequence[Shape], height: int, width: int, turns: int | Sequence[str], rng: np.random.Generator
) -> tuple[Turn, ...]:
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


def _askable(shapes: Sequence[Shape], height: int, width: int) -> dict[str, list[Turn]]:
    """Every question with a clear answer, by kind."""
    kinds = [shape.kind for shape in shapes]
    looks = [(shape.colour, shape.kind) for shape in shapes]
    places = [shape.place(height, width) for shape in shapes]
    found: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    for shape, place in zip(shapes, places, strict=True):
        if kinds.count(shape.kind) == 1:
            found["colour"].append(Turn(f"What colour is the {shape.kind}?", shape.colour, "colour"))
        if looks.count((shape.colour, shape.kind)) == 1:
            found["place"].append(Turn(f"Where is the {shape.colour} {shape.kind}?", PLACES[place], "place"))
        if places.count(place) == 1:
            answer = f"a {shape.colour} {shape.kind}"
            found["what"].append(Turn(f"What is at the {PLACES[place]}?", answer, "what"))
    found["count"] = [Turn(f"How many {kind}s are there?", str(kinds.count(kind)), "count") for kind in SHAPES]
    found["count"] += [Turn("How many shapes are there?", str(len(shapes)), "count")] * 2
    return found
