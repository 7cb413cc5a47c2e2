"""What all figures share, and all pages: a canvas, colours and quiet axes; templates that hold their pictures.

matplotlib is imported on use (the extra `casa-vlm[plots]`), without pyplot: no global figure, no window, and no
setting of the caller's is touched. PNG files and pages are written whole or not at all.
"""

import base64
import io
import os
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa.atomic import replacing, write_text
from casa.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL import Image

# Okabe and Ito's colours, told apart by all readers
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
MAX_TEXT = 1500  # characters of a text that a page shows
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


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


def write_page(path: str | os.PathLike[str], package: str, template: str, **values: Any) -> None:
    """Writes an HTML page: the template of that name in a package, filled. Raises UserError where it cannot be."""
    check_page_path(path)
    write_text(path, filled(package, template, **values))


def filled(package: str, template: str, **values: Any) -> str:
    """The text of a template of a package. What goes into a page is escaped."""
    return _template(package, template).render(values)


def check_page_path(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless the name ends in .html."""
    if not os.fspath(path).lower().endswith((".html", ".htm")):
        raise UserError(f"{path} is to be an HTML page: give it a name that ends in .html.")


def data_url(image: "Image.Image", side: int = 320) -> str:
    """A picture as a page holds it: a JPEG of at most `side` px, in base64."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    held = io.BytesIO()
    small.save(held, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def public_name(name: str | None) -> str:
    """A hub's name as it is; of a folder only its last part: where it lay is nobody's business."""
    text = str(name)
    return text if text.count("/") == 1 and not text.startswith((".", "/", "~")) else Path(text).name


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 picture, 1,200 pictures."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _shown(text: str) -> str:
    """A text as HTML can hold it, cut at `MAX_TEXT`."""
    cut = text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rstrip() + " …"
    return _CONTROLS.sub("\ufffd", cut.strip().replace("\r\n", "\n"))


@cache
def _template(package: str, name: str) -> "Template":
    from jinja2 import Environment

    environment = Environment(autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"data_url": data_url, "counted": counted, "shown": _shown, "public_name": public_name}
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))
