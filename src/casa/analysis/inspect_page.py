"""An inspection as one HTML page that loads nothing: click a token, see where it looked.

Maps of attention are kept in bytes, each as the root of its part of the map's largest value: what is small stays told
apart from nothing. Where they would be more than `MAX_MAPS`, tokens of the question are left out first, and then heads.
"""

import base64
import json
import os
from typing import Any

import torch
from torch import Tensor

from casa.analysis.attention_maps import KINDS
from casa.analysis.inspection import Inspection
from casa.figures import data_url, write_page

MAX_MAPS = 24 * 2**20  # bytes of maps in a page
SIDE = 768  # px of an embedded picture
FILM_SIDE = 320  # px, of several


def write_inspection(
    path: str | os.PathLike[str], found: Inspection, *, model: str = "", max_maps: int = MAX_MAPS
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: A file that ends in .html.
        found: What `inspect_answer` gave.
        model: The model's name, for the heading.
        max_maps: Bytes of attention maps in it.

    Raises:
        UserError: The file has another ending, or cannot be written.
    """
    data = page_data(found, max_maps)
    # what stands in a script element may not end it
    held = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    values = {"found": found, "model": model, "data": held, "several": len(found.pictures) > 1}
    write_page(path, "casa.analysis", "inspect_page.html", **values)


def page_data(found: Inspection, max_maps: int = MAX_MAPS) -> dict[str, Any]:
    """What the page's script reads: plain values, and arrays as base64 of little-endian numbers, row-major."""
    shares = found.shares
    rows = list(range(len(shares.tokens)))
    layers, heads, _, _ = shares.weights.shape
    columns = shares.num_columns
    notes = []
    if layers * heads * columns * len(rows) > max_maps:
        # the place before the first written token is where it comes from
        answered = next((place for place, token in enumerate(found.tokens) if token.answered), len(found.tokens))
        rows = [row for row in rows if shares.tokens[row] >= answered - 1]
        notes.append("Tokens of the question are left out: the maps would be too many.")
    weights = shares.weights[:, :, rows, :columns].transpose(0, 2).transpose(1, 2)  # (q, C, Hq, N)
    if weights.numel() > max_maps:
        weights = weights.mean(2, keepdim=True)
        notes.append("Maps are means over heads: those of each would be too many.")
    scale = weights.amax(-1) if columns else weights.new_zeros(weights.shape[:-1])
    levels = (weights / scale.clamp(min=1e-30)[..., None]).sqrt().mul(255).round().to(torch.uint8)
    row_of = {shares.tokens[row]: number for number, row in enumerate(rows)}
    side = SIDE if len(found.pictures) == 1 else FILM_SIDE
    return {
        "notes": notes,
        "kinds": KINDS,
        "blocks": shares.blocks,
        "heads": heads,
        "mapHeads": weights.shape[2],
        "rows": len(rows),
        "columns": columns,
        "tokens": [
            {
                "text": token.text,
                "answered": token.answered,
                "chance": round(token.probability, 4),
                "reads": row_of.get(place, -1),
                "writes": row_of.get(place - 1, -1),
            }
            for place, token in enumerate(found.tokens)
        ],
        "shares": _floats(shares.shares[:, :, :, rows]),
        "maps": _bytes(levels.contiguous().numpy().tobytes()),
        "scales": _floats(scale),
        "sinks": _bytes(shares.sinks[:, :, :columns].to(torch.uint8).contiguous().numpy().tobytes()),
        "images": [
            {
                "label": label,
                "src": data_url(picture, side),
                "start": -1 if span is None else span.start,
                "grid": grid,
                "width": picture.width,
                "height": picture.height,
            }
            for picture, label, span, grid in zip(
                found.pictures,
                found.labels,
                shares.images or [None] * len(found.pictures),
                shares.grids or [(0, 0)] * len(found.pictures),
                strict=True,
            )
        ],
        "norms": {
            "tokens": _floats(found.norms.tokens),
            "layers": _floats(found.norms.layers),
            "blocks": found.norms.blocks,
        },
        "lens": [
            [
                [[text, round(chance, 4)] for text, chance in zip(texts, chances, strict=True)]
                for row, (texts, chances) in enumerate(zip(layer, of.tolist(), strict=True))
                if row in set(rows)
            ]
            for layer, of in zip(found.guesses, found.lens.probabilities, strict=True)
        ],
        "inserted": found.method == "insertion",
    }


def _floats(x: Tensor) -> str:
    return _bytes(x.contiguous().numpy().astype("<f4").tobytes())


def _bytes(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
