"""Fonts with letters beyond ASCII: those that matplotlib brings along."""

from importlib.util import find_spec
from pathlib import Path


def dejavu(bold: bool = False) -> Path | None:
    """The file of DejaVu Sans, which has the letters of most scripts; None where matplotlib is not installed."""
    matplotlib = find_spec("matplotlib")  # found, not imported: only its font files are wanted
    if matplotlib is None or matplotlib.origin is None:
        return None
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    return file if file.is_file() else None
