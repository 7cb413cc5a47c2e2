"""Names of checkpoints that come with the package, and where they lie."""

import os
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = ("casa-tiny",)


def resolve(name_or_path: Any) -> Any:
    """The folder of a shipped checkpoint; anything else, and a local folder of that name, stays as it is."""
    if name_or_path in SHIPPED and not os.path.isdir(name_or_path):
        return str(ASSETS / name_or_path)
    return name_or_path
