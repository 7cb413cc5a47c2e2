"""The tasks as files: shards that go on where they stopped, read by casa's own reader, trained on by the recipe."""

from pathlib import Path

import pytest
import torch
import yaml

import projects.casa_smol
from casa import FusionConfig
from casa.data.check import check_data
from casa.data.record import Text
from casa.data.records import open_records
from casa.data.settings import parse_data_settings
from casa.testing import tiny_processor, tiny_text_model
from casa.training.config import TokenBudget, open_recipe
from casa.training.samples import SampleMaker
from casa.vision.page_encoder import PageEncoder
from projects.casa_smol import data, parts
from projects.casa_smol.data import SECONDS, SHARES, shard_at, write, write_films
from projects.casa_smol.encoder import Run, Settings
from projects.casa_smol.tasks import TASKS
from projects.casa_smol.tasks.films import FPS, PROMPT
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


@pytest.mark.slow
def test_films_go_on_and_are_live_records_with_the_prompt_that_a_session_has(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FILM_SHARD", 2)
    made = list(write_films(tmp_path, "train", 1, 3))
    assert [path.name for path in made] == ["film-0000.jsonl", "film-0001.jsonl"]
    made[1].unlink()  # broken off: the folder is there, the list is not
    assert list(write_films(tmp_path, "train", 1, 3)) == made[1:]
    source = {"path": str(tmp_path / "film-*.jsonl"), "frame_side": 640}
    checked = check_data(parse_data_settings({"sources": [source]}))
    assert (checked.records, checked.report.total) == (3, 0)
    processor = tiny_processor(delimited=False)
    maker = SampleMaker(processor, TokenBudget(10_000, 100_000))
    for record in open_records(parse_data_settings({"sources": [source], "exhausted": "leave"})):
        (sample,) = maker(record)
        assert len(sample.places) == SECONDS * FPS
        prompt = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
        asked = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        first = asked["input_ids"][0].tolist()
        assert list(sample.ids[: len(first)]) == first
        # each frame has its stop, and nothing else is learned but what is new
        assert sum(sample.learn) == len(sample.places) + sum(
            len(processor.tokenizer.encode(part.text, add_special_tokens=False))
            for message in record.messages
            if message.role == "assistant"
            for part in message.parts
            if isinstance(part, Text)
        )


def test_every_task_is_trained_on_and_is_in_the_recipe():
    assert set(SHARES) == set(TASKS)
    assert sum(SHARES.values()) == 100
    told = yaml.safe_load(RECIPE.read_text())
    files = {Path(source["path"]).name for source in told["data"]["sources"]}
    assert files == {f"{task}-*.tar" for task in TASKS} | {"film-*.jsonl"}
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
