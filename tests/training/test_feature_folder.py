"""Image tokens in a folder: read back as they were, by whoever has the same tower, and by nobody else."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from casa.errors import UserError
from casa.testing import tiny_casa, tiny_processor
from casa.training.collator import FeatureFolder, encoder_digest

TENSORS = {"image_features": torch.randn(6, 8, dtype=torch.bfloat16), "image_grid_thw": torch.tensor([[1, 4, 6]])}
KEY = (b"digest", None)


def same(one, other):
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def test_what_is_kept_is_found_by_another_process_with_the_same_tower(tmp_path):
    FeatureFolder(tmp_path, "tower").keep(KEY, TENSORS)
    again = FeatureFolder(tmp_path, "tower")
    assert same(again.get(KEY), TENSORS)
    assert again.get((b"digest", 12)) is None, "made smaller, it is another picture"
    assert FeatureFolder(tmp_path, "other").get(KEY) is None
    assert (again.hits, again.written) == (1, 0)


@pytest.mark.parametrize(
    "damage", [b"", b"no tensors", None, save({"other": torch.ones(1)})], ids=["empty", "text", "cut off", "other"]
)
def test_a_file_that_is_broken_is_as_none_and_is_written_again(tmp_path, damage):
    folder = FeatureFolder(tmp_path, "tower")
    folder.keep(KEY, TENSORS)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert folder.get(KEY) is None
    folder.keep(KEY, TENSORS)
    assert same(folder.get(KEY), TENSORS)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch, caplog):
    folder = FeatureFolder(tmp_path, "tower")
    folder.keep(KEY, TENSORS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("casa.training.collator.save_file", full)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            folder.keep((b"other", number), TENSORS)
    assert [record.message.count("No space left on device") for record in caplog.records] == [1]
    assert same(folder.get(KEY), TENSORS)
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another feature_cache_dir"):
        FeatureFolder(tmp_path / "file", "tower")


def test_a_tower_has_a_name_of_its_own():
    encoder, processor = tiny_casa(dtype=torch.float32).encoder, tiny_processor().image_processor
    name = encoder_digest(encoder, processor, "cpu", None)
    assert encoder_digest(copy.deepcopy(encoder), copy.deepcopy(processor), "cpu", None) == name
    other, wider, sized = copy.deepcopy(encoder), copy.deepcopy(encoder), copy.deepcopy(processor)
    next(iter(other.parameters())).data.flatten()[0] += 1e-3
    wider.config.window_size *= 2
    sized.rescale_factor = sized.rescale_factor * 2
    names = {
        encoder_digest(other, processor, "cpu", None),
        encoder_digest(wider, processor, "cpu", None),
        encoder_digest(copy.deepcopy(encoder).to(torch.bfloat16), processor, "cpu", None),
        encoder_digest(encoder, sized, "cpu", None),
        encoder_digest(encoder, processor, "cpu", "bf16"),
    }
    assert len(names) == 5
    assert name not in names


def test_what_is_read_maps_no_file(tmp_path):
    """A process may have some 65,000 maps, and a run has more pictures."""
    folder = FeatureFolder(tmp_path, "tower")
    folder.keep(KEY, TENSORS)
    held = [folder.get(KEY) for _ in range(20)]
    assert all(same(one, TENSORS) for one in held)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()
