"""A toy task for tests: grey pictures in which each cell is one of three shades, and questions about the corner."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from casa.training import Recipe, Sources, parse_recipe

CELL = 28
NAMES = ("black", "grey", "white")


def picture(shades: np.ndarray) -> Image.Image:
    pixels = np.repeat(np.repeat(shades * 120, CELL, 0), CELL, 1).astype(np.uint8)
    return Image.fromarray(np.stack([pixels] * 3, -1))


def shades(rng: np.random.Generator, size: tuple[int, int] | None) -> Any:
    rows, columns = (side // CELL for side in size or (56, 56))
    cells = rng.integers(0, 3, (rows, columns))
    turns = [
        SimpleNamespace(question="What is at the top left?", answer=NAMES[cells[0, 0]]),
        SimpleNamespace(question="How many rows are there?", answer=str(rows)),
    ]
    return SimpleNamespace(image=picture(cells), turns=turns, dense={"shade": cells.astype(np.int64)})


@dataclass(frozen=True)
class Clip:
    cells: np.ndarray
    height: int = 2 * CELL
    width: int = 2 * CELL

    def frames(self) -> Iterator[Image.Image]:
        return (picture(np.full((2, 2), shade)) for shade in self.cells)

    def captions(self) -> list[str]:
        return [NAMES[shade] if shade else "" for shade in self.cells]


def clip(rng: np.random.Generator) -> Clip:
    return Clip(rng.integers(0, 3, int(rng.integers(2, 5))))


SOURCES = Sources(
    pictures={"shades": shades},
    clips={"clips": clip},
    channels={"shade": 3},
    empty={"shade": 0},
    sides={"shades": (56, 112)},
    prompt="Say each shade.",
)


def recipe(**changes: Any) -> Recipe:
    """A recipe of seconds; `changes` are keys of a stage's optimisation by stage, or of the recipe."""
    values: dict[str, Any] = {
        "name": "toy",
        "threads": 0,
        "workers": 0,
        "text": {
            "model": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "optimisation": {"steps": 16, "rate": 0.01, "warmup": 2},
            "vocabulary": 300,
            "documents": 12,
            "samples": 6,
            "row_tokens": 64,
        },
        "tower": {
            "model": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 24,
                "fullatt_block_indexes": [1],
                "window_size": 56,
            },
            "optimisation": {"steps": 16, "rate": 0.005, "muon": 0.01, "warmup": 2},
            "mix": {"shades": 1},
            "sizes": [{"until": 0.5, "smallest": 56, "largest": 56}, {"until": 1, "smallest": 56, "largest": 112}],
            "channels": {"shade": 1},
            "patches": 128,
        },
        "fusion": {
            "optimisation": {"steps": 24, "rate": 0.005, "muon": 0.005, "warmup": 2},
            "mix": {"shades": 2, "clips": 1},
            "batch": {"shades": 8, "clips": 3},
            "fresh_patches": 96,
            "smallest": 56,
            "largest": 112,
            "pool_draws": 8,
            "prefill": 4,
            "row_tokens": 96,
            "dropout": 0.05,
        },
    }
    return parse_recipe(values | changes)
