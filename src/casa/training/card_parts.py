"""What model cards of all kinds of runs have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from casa.atomic import write_text
from casa.errors import UserError
from casa.training.curve import draw_curve

CURVE = "loss.png"
_FRONT = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["casa"]}


def front(**more: Any) -> str:
    """What the hub reads, above the card. more: further keys."""
    return f"---\n{yaml.safe_dump({**_FRONT, **more}, sort_keys=False)}---"


def curve(folder: Path, history: Sequence[dict[str, Any]], title: str, label: str) -> str:
    """Draws the log's losses beside the card; the line that shows them, or "" where there is no picture."""
    try:
        drawn = draw_curve(history, folder / CURVE, title)
    except UserError:
        drawn = False  # without matplotlib: a card without its picture is a card
    return f"![{label}]({CURVE})" if drawn else ""


def recipe_block(values: Any) -> str:
    """A recipe as it stands in a file."""
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)}```"


def versions_line(versions: Mapping[str, str]) -> str:
    """Packages with their versions, in words."""
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def write_parts(folder: Path, parts: Sequence[str]) -> None:
    """Writes README.md; parts that are empty are left out."""
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
