"""Checkpoints of a stage while it runs: whole or not at all, and nothing in them is code.

A stage's folder holds `state.safetensors` (weights, moments, step) until the stage is finished; then the stage
writes its result, and `done.json` last. A folder with `done.json` is never computed again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from casa.atomic import replacing, write_text

STATE = "state.safetensors"
DONE = "done.json"


def save_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Saves tensors and JSON-able facts as one file, in place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors wants each tensor to own its memory; tied weights would share it
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(folder / STATE) as part:
        save_file(owned, part, metadata={"facts": json.dumps(facts)})


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the last `save_state`, or None."""
    path = folder / STATE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    return tensors, facts


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def mark_done(folder: Path, facts: Mapping[str, Any]) -> None:
    """Says that the stage's result is complete, and drops its running state."""
    write_text(folder / DONE, json.dumps(facts, indent=2) + "\n")
    (folder / STATE).unlink(missing_ok=True)


def read_done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DONE).read_text(encoding="utf-8"))
