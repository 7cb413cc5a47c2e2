"""One HTML page of samples with their windows: which text sees which pictures, and what the model learns to say.

    +----------------------------------------+
    | pages.jsonl:17   2 pictures, 648 tokens |    a card per sample
    | | [picture] [picture]                   |    a bar per window, in a colour of its own
    | | user       What differs?              |
    | | assistant  The hat.                   |    learned text stands on green
    +----------------------------------------+

The file holds its pictures and styles and loads nothing; it follows the reader's light or dark scheme.
"""

import base64
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from PIL import Image

from casa.atomic import write_text
from casa.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEXT = 1500  # characters of a text that are shown
_SIDE = 320  # px of an embedded picture
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class ShownPicture:
    """A picture of any size. label: stands on it, such as its time. tokens: it is as wide as it has tokens, if any."""

    image: Image.Image
    label: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class ShownText:
    """Words. who: says them. tokens: their share of the window's strip of tokens, which is drawn if there are any."""

    text: str
    who: str = ""
    learned: bool = False
    tokens: int = 0


@dataclass(frozen=True)
class ShownWindow:
    """Pictures and the text that sees them. left_out: pictures that are not shown."""

    pictures: Sequence[ShownPicture] = ()
    texts: Sequence[ShownText] = ()
    left_out: int = 0


@dataclass(frozen=True)
class SampleCard:
    """One sample. title: where it is from. facts: how large it is. left_out: windows that are not shown."""

    title: str
    facts: str
    windows: Sequence[ShownWindow]
    left_out: int = 0


@dataclass(frozen=True)
class BudgetBar:
    """How full a budget of tokens is: `counts` of each sample, of at most `limit` together."""

    name: str
    counts: Sequence[int]
    limit: int


def write_report(
    path: str | os.PathLike[str],
    cards: Sequence[SampleCard],
    *,
    title: str,
    note: str = "",
    bars: Sequence[BudgetBar] = (),
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: A file that ends in .html.
        cards: The samples, in order. Where `bars` are given, they take the width of the page and are numbered.
        title: The page's heading.
        note: A line below it.
        bars: Budgets, above the cards.

    Raises:
        UserError: The file has another ending, or cannot be written.
    """
    check_report_path(path)
    page = _template().render(title=title, note=note, cards=cards, bars=bars)
    write_text(path, page)


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless the name ends in .html."""
    if not os.fspath(path).lower().endswith((".html", ".htm")):
        raise UserError(f"{path} is to be an HTML page: give it a name that ends in .html.")


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 picture, 1,200 pictures."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@cache
def _template() -> "Template":
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"data_url": _data_url, "shown": _shown, "counted": counted}
    return environment.from_string(files("casa.data").joinpath("html_report.html").read_text(encoding="utf-8"))


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    small.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _shown(text: str) -> str:
    """A text as HTML can hold it, cut at `MAX_TEXT`."""
    cut = text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rstrip() + " …"
    return _CONTROLS.sub("\ufffd", cut.strip().replace("\r\n", "\n"))
