"""Figures as PNG files: what streaming costs, and where a CASA model looks. Needs matplotlib."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from casa.analysis.attention_maps import AttentionShares
from casa.analysis.streaming_cost import CostRow
from casa.errors import UserError
from casa.figures import BLUE, GREEN, GREY, ORANGE, new_figure, quieten, write_png

DPI = 150


def plot_cost(rows: Sequence[CostRow], path: str | os.PathLike[str], fps: float = 2.0) -> None:
    """Writes `memory.png`: cache and latency of each frame, CASA beside insertion.

    Args:
        rows: Of `casa.analysis.streaming_cost`.
        path: A PNG file.
        fps: How many frames a second the stream has; its limit is drawn in.

    Raises:
        UserError: There are no rows, matplotlib is missing, or the file cannot be written.
    """
    if not rows:
        raise UserError("no frame was watched, so there is no cost to plot; give at least one.")
    figure = new_figure(9.0, 3.7, DPI)
    memory, latency = figure.subplots(1, 2)
    frames = np.arange(1, len(rows) + 1)
    rival = [row.insertion for row in rows if row.insertion is not None]
    bytes_of = {"CASA": [row.casa.usage.cache_bytes for row in rows], "insertion": [c.usage.cache_bytes for c in rival]}
    most = max(max(values) for values in bytes_of.values() if values)
    unit, divisor = ("MiB", 2**20) if most >= 2**20 else ("KiB", 2**10)
    seconds_of = {"CASA": [row.casa.seconds for row in rows], "insertion": [cost.seconds for cost in rival]}
    for name, colour in (("insertion", ORANGE), ("CASA", BLUE)):
        held, took = np.array(bytes_of[name]) / divisor, np.array(seconds_of[name]) * 1000
        if len(held) == 0:
            continue
        at = frames[: len(held)]
        memory.plot(at, held, color=colour, linewidth=2, label=name)
        size = f"{held[-1]:.{2 if held[-1] < 10 else 0}f} {unit}"
        _say(memory, at[-1], held[-1], size if len(held) == len(rows) else f"stopped at {size}", colour)
        latency.plot(at, took, color=colour, linewidth=0.8, alpha=0.35)
        latency.plot(at, _running_median(took), color=colour, linewidth=2, label=name)
    memory.set_title("what is remembered", fontsize=11)
    memory.set_ylabel(f"cache ({unit})")
    latency.set_title("time to caption a frame", fontsize=11)
    latency.set_ylabel("latency (ms)")
    for axes in (memory, latency):
        axes.set_xlabel("frame")
        axes.set_xlim(1, max(2.0, len(rows) * 1.02))
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", frameon=False)
        quieten(axes)
    limit = 1000 / fps
    if limit < 1.5 * latency.get_ylim()[1]:
        latency.axhline(limit, color=GREY, linewidth=1, linestyle=":")
        latency.text(len(rows), limit, f"{fps:g} frames a second ", color=GREY, fontsize=8, ha="right", va="bottom")
    write_png(figure, path)


def plot_attention(
    shares: AttentionShares,
    picture: Image.Image,
    path: str | os.PathLike[str],
    *,
    token: int,
    written: str,
    layer: int | None = None,
) -> None:
    """Writes `attention.png`: per layer, attention to self, one other text token, one image token; and one map.

    Args:
        token: The text token whose attention to its image is laid over `picture`.
        written: What the model wrote there.
        layer: Which CASA layer's map; by default the one that looks hardest at a single place.

    Raises:
        UserError: The token was not measured, matplotlib is missing, or the file cannot be written.
    """
    layer = shares.sharpest_layer(token) if layer is None else layer
    weights = shares.image_map(layer, token).numpy()
    figure = new_figure(9.0, 3.9, DPI)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.0, 1.0]})
    blocks = np.arange(len(shares.blocks))
    for name, values, colour, marker in (
        ("itself", shares.own, BLUE, "o"),
        ("one other text token", shares.per_other_text, GREEN, "s"),
        ("one image token", shares.per_image_token, ORANGE, "^"),
    ):
        left.plot(blocks, _mean(values.numpy()), color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
    left.set_yscale("log")
    left.set_xticks(blocks, [str(block) for block in shares.blocks])
    left.margins(x=0.08)
    left.set_xlabel("CASA layer in block")
    left.set_ylabel("attention of a text token to")
    left.set_title(f"mean over {len(shares.tokens)} text tokens", fontsize=11)
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.0)
    quieten(left)

    rows, columns = weights.shape
    extent = (0, columns, rows, 0)
    right.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
    heat = weights / max(float(weights.max()), 1e-30)
    finer = Image.fromarray(heat.astype(np.float32)).resize((columns * 16, rows * 16), Image.Resampling.BICUBIC)
    fine = np.asarray(finer).clip(0, 1)
    shade = {"cmap": "inferno", "vmin": 0, "vmax": float(weights.max()), "alpha": 0.8 * fine**0.7}
    drawn = right.imshow(fine * weights.max(), extent=extent, aspect="auto", **shade)
    right.set_box_aspect(picture.height / picture.width)
    right.set_xticks([])
    right.set_yticks([])
    right.set_title(f"to write {written} (block {shares.blocks[layer]})", fontsize=11)
    bar = figure.colorbar(drawn, ax=right, fraction=0.046, pad=0.03)
    bar.solids.set_alpha(1)
    bar.set_label("attention to one image token", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    write_png(figure, path)


def _say(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), xytext=(-2, 5), textcoords="offset points", ha="right", va="bottom", color=colour)


def _mean(values: np.ndarray) -> np.ndarray:
    """Per layer, over the tokens; what a token does not see is NaN, and zero has no logarithm."""
    seen = [row[np.isfinite(row) & (row > 0)] for row in values]
    return np.array([row.mean() if len(row) else np.nan for row in seen])


def _running_median(values: np.ndarray, width: int = 9) -> np.ndarray:
    """The median of the values around each, over at most `width` of them."""
    half = width // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
