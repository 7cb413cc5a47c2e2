"""The losses of a run as a picture for its model card. Needs matplotlib."""

import os
from collections.abc import Sequence
from typing import Any

from casa.figures import BLUE, ORANGE, new_figure, quieten, write_png

_SMOOTH = 20  # entries that a point of the smoothed line looks back over


def draw_curve(history: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "") -> bool:
    """Draws the log's `loss`, and `eval_loss` if there is any, over steps; False if there is no loss to draw.

    Raises UserError without matplotlib.
    """
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not points:
        return False
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    steps, losses = zip(*points, strict=True)
    few = len(points) < 2 * _SMOOTH
    axes.plot(
        steps, losses, color=BLUE, alpha=1.0 if few else 0.25, linewidth=1.2 if few else 0.8,
        marker="o" if len(points) < 12 else None, markersize=3, label="training" if few else None,
    )  # fmt: skip
    if not few:
        axes.plot(steps, _smoothed(losses), color=BLUE, linewidth=1.6, label="training")
    if held:
        axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", markersize=3.5, linewidth=1.4, label="held out")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    quieten(axes)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    write_png(figure, path)
    return True


def _smoothed(losses: Sequence[float]) -> list[float]:
    found = []
    for number in range(len(losses)):
        recent = losses[max(0, number - _SMOOTH + 1) : number + 1]
        found.append(sum(recent) / len(recent))
    return found
