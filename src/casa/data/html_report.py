"""One HTML page of samples with their windows: which text sees which pictures, and what the model learns to say.

    +----------------------------------------+
    | pages.jsonl:17   2 pictures, 648 tokens |    a card per sample
    | | [picture] [picture]                   |    a bar per window, in a colour of its own
    | | user       What differs?              |
    | | assistant  The hat.                   |    learned text stands on green
    +----------------------------------------+

The file holds its pictures and styles and loads nothing; it follows the reader's light or dark scheme.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from casa.figures import write_page


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
    write_page(path, "casa.data", "html_report.html", title=title, note=note, cards=cards, bars=bars)
