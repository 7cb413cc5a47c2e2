"""docs/training.md: its commands run in order, its recipes are recipes, and every block is told."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from casa.cli.main import run
from casa.training.config import Recipe, open_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)( no-run)?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, kept, text in BLOCKS if kind == "sh" and not kept for line in text.splitlines()]
KEPT = [line for kind, kept, text in BLOCKS if kind == "sh" and kept for line in text.splitlines()]
RECIPES = [yaml.safe_load(text) for kind, _, text in BLOCKS if kind == "yaml"]


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (record,) = [json.loads(text) for kind, _, text in BLOCKS if kind == "json"]
    (tmp_path / "receipts").mkdir()
    lines = []
    for number in range(1, 9):
        name = f"receipts/{number:04}.jpg"
        Image.new("RGB", (84, 56), (20 * number, 90, 90)).save(tmp_path / name)
        lines.append(json.dumps({**record, "images": [name]}) + "\n")
    (tmp_path / "pages.jsonl").write_text("".join(lines))
    # as it stands there, but for fewer steps
    short = {
        **RECIPES[0],
        "optimisation": {**RECIPES[0]["optimisation"], "steps": 2, "warmup_steps": 1, "decay_steps": 1},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(short | {"device": "cpu"}))
    for line in LINES:
        line = line.replace("steps=30", "steps=3").replace("steps=200", "steps=4")
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            run()
        except SystemExit as end:
            assert end.code in (0, None), (line, capsys.readouterr().err)  # noqa: PT017
    assert (tmp_path / "batch.html").exists()
    assert (tmp_path / "runs" / "mine" / "checkpoint-3").is_dir()
    assert (tmp_path / "runs" / "mine" / "final" / "README.md").exists()


def test_its_recipes_are_recipes():
    whole, lora, evaluation = RECIPES
    assert parse_recipe(whole).optimisation.steps == 20
    assert parse_recipe({**whole, **lora}).model.lora.rank == 16
    assert parse_recipe({**whole, **evaluation}).evaluation.packs == 8


@pytest.mark.parametrize("line", KEPT)
def test_commands_that_cannot_run_here_name_recipes_and_settings(line):
    words = shlex.split(line)
    recipe = next(word for word in words if word.endswith(".yaml"))
    changes = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
    assert isinstance(open_recipe(ROOT / recipe, changes), Recipe)


def test_every_block_and_recipe_is_told():
    for field in dataclasses.fields(Recipe):
        assert re.search(rf"`{field.name}`", PAGE), field.name
    table = dict(re.findall(r"^\| `([\w-]+)` \| .*? \| ([\d,]+) \|", PAGE, re.MULTILINE))
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in PAGE
        if path.stem != "casa-tiny":
            assert int(table[path.stem].replace(",", "")) == open_recipe(path).optimisation.steps
