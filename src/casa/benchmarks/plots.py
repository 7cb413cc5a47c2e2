"""What the plots of the benchmarks share: panels side by side, written whole or not at all. Needs matplotlib."""

import os
from typing import Any

from casa.atomic import replacing
from casa.errors import UserError

# Okabe and Ito's colours, told apart by all readers
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure and `count` axes in a row. Raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Plots need matplotlib: install casa-vlm[plots].") from error
    figure = Figure(figsize=(4.6 * count, 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def finish(figure: Any, axes: list[Any], path: str | os.PathLike[str]) -> None:
    """Every panel from 0 on and with its legend, as a PNG."""
    for one in axes:
        one.set_ylim(bottom=0)
        one.legend(frameon=False, fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120, metadata={"Software": None})
