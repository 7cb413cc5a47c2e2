"""What all figures share: a canvas of their own, colours, quiet axes, and a PNG written whole or not at all.

matplotlib is imported on use (the extra `casa-vlm[plots]`), without pyplot: no global figure, no window, and no
setting of the caller's is touched.
"""

import os
from typing import Any

from casa.atomic import replacing
from casa.errors import UserError

# Okabe and Ito's colours, told apart by all readers
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def new_figure(width: float, height: float, dpi: int = 120) -> Any:
    """An empty matplotlib figure of so many inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Plots need matplotlib: install casa-vlm[plots].") from error
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quieten(axes: Any) -> None:
    """No frame at the top and right, and a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def write_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes the figure. Raises UserError if the file cannot be written."""
    with replacing(path) as unfinished:
        try:
            # the library's version in the file would change its bytes
            figure.savefig(unfinished, format="png", metadata={"Software": None})
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): free some space.") from error
