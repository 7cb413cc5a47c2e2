"""Where a figure comes from: the commit, the versions and the machine, recorded beside every result."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("casa-vlm", "torch", "transformers", "numpy", "pillow", "av", "scikit-learn", "scikit-image")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """JSON-ready facts: `commit` (None outside a checkout; "+" when files differ from it), versions, machine."""
    import torch

    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The checkout's commit, with a "+" behind it if tracked files differ from it."""
    folder = Path(__file__).resolve().parent
    try:
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        inside = Path(_git(folder, "rev-parse", "--show-toplevel")) / "src" / "casa" == folder
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return (found + ("+" if changed else "")) if inside else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
