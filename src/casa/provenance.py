"""Where a figure comes from: commit, versions, machine and weights, recorded beside every result."""

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("casa-vlm", "torch", "transformers", "numpy", "pillow", "av", "scikit-learn", "scikit-image")


def provenance(device: str = "cpu", model: str | Path | None = None) -> dict[str, Any]:
    """JSON-ready facts: `commit` (None outside a checkout; "+" when files differ from it), versions, machine.

    Args:
        model: A checkpoint that lies on this machine, or a shipped one's name; then `weights` is its fingerprint.
    """
    import torch

    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    facts = {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if model is not None:
        from casa.models.loading import resolve

        facts["weights"] = fingerprint(Path(resolve(model)))
    return facts


def fingerprint(folder: Path) -> str | None:
    """Twelve hexadecimal digits of the SHA-256 of a checkpoint's weights, None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12] if files else None


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
