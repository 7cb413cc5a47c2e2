"""A checkpoint in shards is read without running what it holds, whether it is exported or gone on with."""

import io
import os
import pickle
import re

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from casa.errors import UserError
from casa.testing import tiny_casa
from casa.training.sharding import export_checkpoint
from casa.training.sharding.shards import read_moments, read_weights, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Tried:
    """A whole checkpoint, its model, and all the ways to read it."""

    def __init__(self, folder):
        self.model = tiny_casa(dtype=torch.float32)
        self.checkpoint, self.out, self.trap = folder / "checkpoint-3", folder / "out", Trap(folder / "sprung")
        self.model.config.save_pretrained(self.checkpoint)
        (self.checkpoint / "trainer_state.json").write_text("{}")
        optimiser = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        write_shards(self.checkpoint, self.model, optimiser)
        self.metadata = self.checkpoint / "sharded" / ".metadata"
        (self.shards,) = (self.checkpoint / "sharded").glob("*.distcp")

    def hide(self):
        """Puts the trap behind the tensors, as a value of its own; where it lies."""
        written, at = io.BytesIO(), self.shards.stat().st_size
        torch.save(self.trap, written)
        with self.shards.open("ab") as file:
            file.write(written.getvalue())
        return _StorageInfo(self.shards.name, at, len(written.getvalue()))

    def assert_refused(self, words):
        optimiser = torch.optim.AdamW(self.model.parameters())
        for read in (
            lambda: export_checkpoint(self.checkpoint, self.out),
            lambda: read_weights(self.checkpoint, self.model),
            lambda: read_moments(self.checkpoint, self.model, optimiser),
        ):
            with pytest.raises(UserError, match=rf"{words}.*take another checkpoint") as caught:
                read()
            assert "\n" not in str(caught.value)
        assert not self.trap.folder.exists()
        assert not self.out.exists()


@pytest.fixture
def tried(tmp_path):
    return Tried(tmp_path)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("inside", [False, True])
def test_metadata_that_would_run_code(tried, inside):
    written = tried.trap
    if inside:
        written = pickle.loads(tried.metadata.read_bytes())
        written.planner_data["weights"] = tried.trap
    tried.metadata.write_bytes(pickle.dumps(written))
    tried.assert_refused(r"\.metadata is damaged, or made to run code \(it asks for \w+\.mkdir\)")


def test_values_that_are_no_tensors(tried):
    """torch unpickles them freely, where a tensor was to be read."""
    changed = pickle.loads(tried.metadata.read_bytes())
    for key in changed.state_dict_metadata:
        changed.state_dict_metadata[key] = BytesStorageMetadata()
        changed.storage_data[MetadataIndex(key)] = tried.hide()
    tried.metadata.write_bytes(pickle.dumps(changed))
    tried.assert_refused("it asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata")


def test_a_shard_that_would_run_code(tried):
    changed = pickle.loads(tried.metadata.read_bytes())
    hidden = tried.hide()
    changed.storage_data = dict.fromkeys(changed.storage_data, hidden)
    tried.metadata.write_bytes(pickle.dumps(changed))
    tried.assert_refused(r"sharded cannot be read \(it is damaged, or made to run code\)")


@pytest.mark.parametrize("left", [0, 1, 200])
def test_damaged_metadata(tried, left):
    tried.metadata.write_bytes(tried.metadata.read_bytes()[:left])
    tried.assert_refused(r"\.metadata is damaged")


def test_damaged_shards(tried):
    tried.shards.write_bytes(tried.shards.read_bytes()[:64])
    tried.assert_refused("sharded cannot be read")


@pytest.mark.parametrize(
    "elsewhere", [b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n", b"cpathlib\nWindowsPath\n"]
)
def test_a_checkpoint_from_elsewhere(tried, elsewhere):
    """The folder it was written to stands in the metadata, as a path of that machine and that Python."""
    written = pickle.dumps(pickle.loads(tried.metadata.read_bytes()), protocol=2)
    changed, count = re.subn(rb"cpathlib(\._local)?\nPosixPath\n", elsewhere, written)
    assert count == 1
    tried.metadata.write_bytes(changed)
    export_checkpoint(tried.checkpoint, tried.out)
    assert (tried.out / "model.safetensors").is_file()
