"""docs/data.md: every example in it is read, and every reason and setting is told."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from casa.data import SourceSettings, parse_data_settings, parse_row
from casa.data.formats import READERS, START, file_parts, read_rows
from casa.data.record import REASONS
from casa.data.shapes import SHAPES, recognised

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^#)", PAGE, re.MULTILINE | re.DOTALL))


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


EXAMPLES = [
    (shape, kind, block) for shape, text in SECTIONS.items() for kind in ("json", "csv") for block in blocks(text, kind)
]


@pytest.fixture
def files(root):
    """The files that the examples name."""
    for name in ("cat.jpg", "dog.jpg", "kitchen.mp4", "game.mp4"):
        (root / name).write_bytes((root / "a.png").read_bytes())
    return root


@pytest.mark.parametrize(("shape", "kind", "text"), EXAMPLES)
def test_every_example_is_a_record_of_its_shape(files, context, shape, kind, text):
    path = files / f"example.{kind}"
    path.write_text(json.dumps([json.loads(text)]) if kind == "json" else text)
    rows = [row.value for row in read_rows(file_parts(path)[0], START, lambda row: True)]
    assert rows
    for row in rows:
        assert recognised({"messages": row} if isinstance(row, list) else row) == shape
        assert parse_row(row, context()) == parse_row(row, context(shape=shape))
        assert list(parse_row(row, context()).pictures())


def test_every_shape_has_an_example():
    assert {shape for shape, _, _ in EXAMPLES} == set(SHAPES)


def test_the_settings_are_settings():
    (text,) = blocks(PAGE, "yaml")
    settings = parse_data_settings(yaml.safe_load(text))
    assert len(settings.sources) == 5


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(SourceSettings)])
def test_every_setting_is_told(setting):
    assert re.search(rf"\b{setting}\b", PAGE)


def test_every_reason_and_ending_is_told():
    for reason, meaning in REASONS.items():
        assert f"| `{reason}` | {meaning} |" in PAGE
    for ending in set(READERS) - {".ndjson"}:
        assert f"`{ending}`" in PAGE


def test_the_code_runs(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pages").mkdir()
    turns = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]
    written(tmp_path / "pages" / "a.jsonl", [{"messages": turns}] * 20)
    (code,) = blocks(PAGE, "python")
    exec(compile(code, "docs/data.md", "exec"), {})
