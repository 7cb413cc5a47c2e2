"""What a run has trained on, and what became of its records: added up over all its processes and their readers."""

import json
from collections import Counter
from collections.abc import Iterable

from casa.training.packs import StreamPosition

COUNTED = ("packs", "samples", "text_tokens", "image_tokens", "images", "learned", "dropped")


def trained_on(positions: Iterable[StreamPosition]) -> dict[str, int]:
    """Totals since the run began, by the keys of `COUNTED`. positions: one of each process."""
    found: Counter[str] = Counter()
    for position in positions:
        found.update(position.taken)
    return {name: found[name] for name in COUNTED}


def made_of_records(positions: Iterable[StreamPosition]) -> Counter[str]:
    """Records, samples, and how many records were downscaled, split or refused (`SampleMaker.counts`)."""
    found: Counter[str] = Counter()
    for position in positions:
        for reader in position.positions.values():
            found.update(json.loads(reader)["counts"])
    return found
