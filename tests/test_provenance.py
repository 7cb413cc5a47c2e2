"""What a result says of its origin: the weights it was measured with, and nothing of this machine's folders."""

import json

from casa.models.loading import ASSETS
from casa.provenance import fingerprint, provenance


def test_a_fingerprint_is_of_the_weights_alone(tmp_path):
    assert fingerprint(tmp_path) is None
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    first = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) == first
    assert len(first) == 12
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    both = fingerprint(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"too")
    assert len({first, both, fingerprint(tmp_path)}) == 3


def test_a_shipped_name_is_known_and_a_hubs_is_not():
    assert provenance(model="casa-tiny")["weights"] == fingerprint(ASSETS / "casa-tiny")
    assert provenance(model="somebody/their-model")["weights"] is None
    assert "weights" not in provenance()


def test_it_is_json_and_names_no_folder():
    told = json.dumps(provenance(model="casa-tiny"))
    assert str(ASSETS.parent) not in told
    assert {"commit", "python", "versions", "device", "cores", "threads"} <= set(json.loads(told))
