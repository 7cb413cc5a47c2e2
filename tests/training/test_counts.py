"""What a run has trained on is added up over its processes and readers, also after a resume."""

import json

from casa.training.packed_dataset import DataPosition, PackedBatch
from casa.training.run import COUNTED, made_of_records, trained_on


def batch(reader, samples, **counts):
    """A batch of a reader that has counted so much until then."""
    facts = {"samples": samples, "text_tokens": 10 * samples, "learned": 2 * samples}
    return PackedBatch({}, json.dumps({"counts": counts}), reader, facts)


def test_processes_and_readers_are_added_up():
    first, second = DataPosition(2), DataPosition(2)
    for taken in (batch(0, 3, records=4), batch(1, 2, records=5), batch(0, 1, records=9, split=1)):
        first.take(taken)
    second.take(batch(0, 5, records=6, split=2, refused=1))
    # as checkpoints keep them
    both = [DataPosition.from_dict(json.loads(json.dumps(one.to_dict()))) for one in (first, second)]
    both[1].take(batch(0, 7, records=8, split=2, refused=1))
    totals = trained_on(both)
    assert tuple(totals) == COUNTED
    assert {name: count for name, count in totals.items() if count} == {
        "packs": 5,
        "samples": 18,
        "text_tokens": 180,
        "learned": 36,
    }
    # a reader's last counts hold those before
    assert made_of_records(both) == {"records": 9 + 5 + 8, "split": 3, "refused": 1}
