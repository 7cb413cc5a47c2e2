"""A run that keeps its frozen tower's work is the run that does it anew; where nothing can be kept, it says so."""

import copy

import pytest
import torch

from casa.errors import UserError
from casa.training.trainer import cache_features

FROZEN = {"frozen": (r"^vision\.",)}


@pytest.mark.slow
def test_the_losses_are_the_same(small, tmp_path):
    choices = {"plain": {}, "kept": {"feature_cache_gb": 0.1}, "little": {"feature_cache_gb": 1e-6}}
    runs = {}
    for name, more in choices.items():
        # random numbers begin anew with every trainer
        runs[name] = small.trainer(tmp_path / name, **FROZEN, **more)
        runs[name].train()
    curves = {name: small.curve(tmp_path / name) for name in runs}
    assert curves["kept"] == pytest.approx(curves["plain"], rel=1e-5)
    assert curves["little"] == pytest.approx(curves["plain"], rel=1e-5)
    kept = runs["kept"].dataset.collator.cache
    assert kept.hits > 0
    assert kept.encodes <= 40 + 16  # every picture once, and the blank ones
    assert runs["little"].dataset.collator.cache.encodes > kept.encodes


@pytest.mark.slow
def test_going_on_is_the_same_too(small, tmp_path):
    small.trainer(tmp_path, **FROZEN, feature_cache_gb=0.1).train()
    whole = small.curve(tmp_path)
    again = small.trainer(tmp_path, **FROZEN, feature_cache_gb=0.1)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-6")
    assert again.dataset.collator.cache.encodes > 0
    assert small.curve(tmp_path) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_a_folder_serves_another_run(small, tmp_path):
    """The same losses, and not one picture encoded, whether or not memory holds them too."""
    kept = {**FROZEN, "feature_cache_dir": str(tmp_path / "features")}
    small.trainer(tmp_path / "first", **kept, feature_cache_gb=0.1).train()
    for name, room in (("large", 0.1), ("little", 1e-6)):
        run = small.trainer(tmp_path / name, **kept, feature_cache_gb=room)
        run.train()
        assert small.curve(tmp_path / name) == pytest.approx(small.curve(tmp_path / "first"), rel=1e-5)
        assert run.dataset.collator.cache.encodes <= 16  # the blank ones


def test_a_folder_wants_memory_too(small, tmp_path):
    with pytest.raises(ValueError, match=r"feature_cache_gb is 0\.0; it must be above 0 beside feature_cache_dir"):
        small.trainer(tmp_path, **FROZEN, feature_cache_dir=str(tmp_path))


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_its_own_tower_made(small, tmp_path):
    """Also where the tower that it was begun from has become another one since."""
    kept = {**FROZEN, "feature_cache_gb": 0.1, "feature_cache_dir": str(tmp_path / "features")}
    small.trainer(tmp_path / "run", **FROZEN).train()
    changed = small.model()
    with torch.no_grad():
        for parameter in changed.encoder.parameters():
            parameter.mul_(1.5)
    before = copy.deepcopy(changed)
    going_on = small.trainer(tmp_path / "run", **kept, own_model=changed)
    going_on.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-6")
    fresh = small.trainer(tmp_path / "fresh", **kept, own_model=before)
    fresh.train()
    assert fresh.dataset.collator.cache.folder.hits == 0


def test_a_tower_that_is_trained_cannot_be_kept(small, tmp_path):
    with pytest.raises(UserError, match="frozen image tower"):
        small.trainer(tmp_path, feature_cache_gb=0.1)


def test_nor_can_readers_elsewhere(small, tmp_path):
    with pytest.raises(ValueError, match="num_workers is 1; it must be 0"):
        small.trainer(tmp_path, **FROZEN, feature_cache_gb=0.1, num_workers=1)


def test_nor_shards(small, tmp_path, monkeypatch):
    run = small.trainer(tmp_path, **FROZEN)
    monkeypatch.setattr(run, "sharded", True)
    with pytest.raises(UserError, match="sharding: fsdp"):
        cache_features(run)
