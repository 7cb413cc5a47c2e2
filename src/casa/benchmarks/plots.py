"""What the plots of the benchmarks share: panels side by side. Needs matplotlib."""

import os
from typing import Any

from casa.figures import new_figure, quieten, write_png


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure and `count` axes in a row. Raises UserError without matplotlib."""
    figure = new_figure(4.6 * count, 3.6)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        quieten(one)
    return figure, axes


def finish(figure: Any, axes: list[Any], path: str | os.PathLike[str]) -> None:
    """Every panel from 0 on, with a tenth of room above its highest line and with its legend, as a PNG."""
    for one in axes:
        # a line that hardly changes would otherwise lie on the upper edge
        one.margins(y=0)
        one.set_ylim(0, 1.1 * one.get_ylim()[1])
        one.legend(frameon=False, fontsize=8)
    write_png(figure, path)
