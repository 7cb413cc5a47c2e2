"""The batches of a step that went wrong, kept for people to look at.

run/inspect-412/batch-0-0.safetensors     process 0, its first batch: what the model was called with
run/inspect-412/facts-0.json              why, recent losses, and where its records were read
"""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from casa.atomic import replacing, write_text
from casa.training.packs import Batch


def save_for_inspection(
    folder: Path, step: int, rank: int, batches: Sequence[Batch], fault: str, loss: float | None, recent: list[float]
) -> Path:
    """Writes the step's batches; returns their folder."""
    place = folder / f"inspect-{step}"
    place.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        with replacing(place / f"batch-{rank}-{number}.safetensors") as part:
            save_file({name: tensor.contiguous().clone() for name, tensor in batch.inputs.items()}, part)
    facts = {
        "step": step,
        "fault": fault,
        "loss": repr(loss),
        "recent": recent,
        "batches": [{**batch.facts, "records": list(batch.origins)} for batch in batches],
    }
    write_text(place / f"facts-{rank}.json", json.dumps(facts, indent=2) + "\n")
    return place
