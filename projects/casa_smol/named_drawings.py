"""Drawings to name, one by one: in a style never seen, in seen styles, and with names never seen.

Beside the model stands the nearest neighbour: the name of the training drawing whose features, EfficientNet-Lite0's
averaged over the picture, are most alike.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from projects.casa_smol.damage import worn
from projects.casa_smol.lite0 import lite0, pooled
from projects.casa_smol.tasks import WEAR, Browser, Turn
from projects.casa_smol.tasks.drawings import HELD_OUT_STYLE, NAME, STYLES, image, laid_out, shown, styles
from projects.casa_smol.tasks.html import Html
from projects.casa_smol.words import is_held_out, pick

# style that is trained on or not, and names that are trained on or not
KINDS = {"drawing_new_style": (False, True), "drawing_seen_style": (True, True), "drawing_new_name": (True, False)}
TRAINED = tuple(style for style in STYLES if style != HELD_OUT_STYLE)
SHEET = 48


def named(kind: str, seed: int, count: int, browser: Browser) -> Iterator[tuple[Image.Image, Turn]]:
    """Drawings of one of KINDS with the question for their name."""
    seen_style, seen_name = KINDS[kind]
    rng = np.random.default_rng((seed, sorted(KINDS).index(kind)))
    asked = []
    for _ in range(count):
        style = pick(rng, TRAINED) if seen_style else HELD_OUT_STYLE
        name = pick(rng, [name for name in styles()[style] if is_held_out(name) != seen_name])
        asked.append((laid_out(rng, [styles()[style][name]]), Turn(pick(rng, NAME), (shown(name),))))
    pictures = chain.from_iterable(_sheets([html for html, _ in asked], browser))
    for picture, (_, turn) in zip(pictures, asked, strict=True):
        yield worn(picture, rng, WEAR["drawing"]), turn


def _sheets(documents: Sequence[Html], browser: Browser) -> Iterator[list[Image.Image]]:
    for first in range(0, len(documents), SHEET):
        yield browser.draw(documents[first : first + SHEET])


class Nearest:
    """Names pictures by the most alike of the training drawings. Raises UserError without Lite0's weights.

    Args:
        browser: Draws what is compared with.
        features: Pictures to (n, d) of length 1; Lite0's if left out.
    """

    def __init__(self, browser: Browser, features: Callable[[Sequence[Image.Image]], Tensor] | None = None) -> None:
        self._features = features or partial(pooled, model=lite0())
        trained = [(name, svg) for style in TRAINED for name, svg in styles()[style].items() if not is_held_out(name)]
        self._names = [shown(name) for name, _ in trained]
        documents = [Html(image(svg, 160), "background: #fff; padding: 16px", 192) for _, svg in trained]
        self._known = torch.cat([self._features(sheet) for sheet in _sheets(documents, browser)])

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        best = (self._features(pictures) @ self._known.T).argmax(1)
        return [self._names[number] for number in best.tolist()]
