"""The tasks as files: shards that go on where they stopped, read by casa's own reader, trained on by the recipe."""

from pathlib import Path

import torch
import yaml

import projects.casa_smol
from casa import FusionConfig
from casa.data.check import check_data
from casa.data.settings import parse_data_settings
from casa.testing import tiny_processor, tiny_text_model
from casa.training.config import open_recipe
from casa.vision.page_encoder import PageEncoder
from projects.casa_smol import data, parts
from projects.casa_smol.data import SHARES, shard_at, write
from projects.casa_smol.encoder import Run, Settings
from projects.casa_smol.tasks import TASKS
from projects.casa_smol.weights import export

RECIPE = Path(projects.casa_smol.__file__).with_name("casa-smol.yaml")


def test_shards_go_on_and_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 3)
    shares = {"line": 2, "page": 1}
    made = list(write(tmp_path, "train", 1, 6, shares))
    assert [path.name for path in made] == ["line-0000.tar", "page-0000.tar", "line-0001.tar"]
    kept = shard_at(tmp_path, "line", 0).read_bytes()
    shard_at(tmp_path, "line", 0).unlink()
    assert [path.name for path in write(tmp_path, "train", 1, 6, shares)] == ["line-0000.tar"]
    assert shard_at(tmp_path, "line", 0).read_bytes() == kept
    assert list(write(tmp_path, "train", 1, 6, shares)) == []
    checked = check_data(parse_data_settings({"sources": [{"path": str(tmp_path / "*.tar")}]}))
    assert (checked.records, checked.report.total) == (6, 0)


def test_every_task_is_trained_on_and_is_in_the_recipe():
    assert set(SHARES) == set(TASKS)
    assert sum(SHARES.values()) == 100
    told = yaml.safe_load(RECIPE.read_text())
    assert {Path(source["path"]).name for source in told["data"]["sources"]} == {f"{task}-*.tar" for task in TASKS}
    assert open_recipe(RECIPE).name == "casa-smol"


def test_parts_are_folders_of_any_llama(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FUSION", FusionConfig.parallel(projector="linear"))
    monkeypatch.setattr(parts, "codes_of_words", lambda model, texts, table, size: torch.rand(len(table), size))
    run = Run.start(Settings(hidden_size=8, stem_sizes=(4, 4), dilations=(1,), score_pages=1, bf16=False))
    run.keep(tmp_path)
    export(tmp_path, tmp_path / "page.safetensors", pages=1)
    tiny_text_model().save_pretrained(tmp_path / "llama")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "llama")
    folders = [str(tmp_path / name) for name in ("out", "llama", "page.safetensors")]
    command = [folders[0], "--text", folders[1], "--encoder", folders[2], "--tokens", "64"]
    assert parts.main(command) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"text", "eyes"}
    eyes = PageEncoder.from_pretrained(tmp_path / "out" / "eyes")
    assert eyes.config.token_parts[0] == "words"
    assert eyes.word_codes.any()
    before = (tmp_path / "out" / "text" / "model.safetensors").stat().st_mtime_ns
    assert parts.main(command) == 0
    assert (tmp_path / "out" / "text" / "model.safetensors").stat().st_mtime_ns == before
