"""`casa data check`: what it prints, draws and writes, and its exit status."""

import json

import pytest
from PIL import Image

GOOD = {"image": "a.png", "caption": "A [bold]cat[/bold]."}
BAD = {"image": "[red]missing.png", "caption": "A cat."}


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (56, 28), "red").save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, BAD, GOOD)) + '{"image": "a')
    return path


def test_a_table_and_the_bad_lines(casa, rows):
    result = casa("data", "check", rows)
    assert result.status == 0
    assert "2 good records and 2 bad" in result.out
    assert f"{rows}:2: There is no picture {rows.parent}/[red]missing.png" in result.out
    assert f"{rows}:4: The line is no JSON" in result.out
    assert "image tokens" in result.out
    assert "text tokens" not in result.out


def test_strict_exits_with_2_and_the_first_line(casa, rows):
    result = casa("data", "check", rows, "--strict")
    assert result.status == 2
    assert "2 good records" in result.out
    assert result.err.strip().endswith("check the path, or set root. (1 more)")
    rows.write_text(json.dumps(GOOD) + "\n")
    assert casa("data", "check", rows, "--strict").status == 0


@pytest.mark.parametrize("text", ["", "\n\n", json.dumps(BAD) + "\noops\n"])
@pytest.mark.parametrize("options", [(), ("--json",), ("--strict",), ("--limit", 1)])
def test_data_without_a_good_record_fail(casa, rows, text, options):
    rows.write_text(text)
    result = casa("data", "check", rows, *options)
    assert result.status == 2
    assert "0 good records" in result.out or json.loads(result.out)["records"] == 0
    assert f"{rows} has no record to learn from: " in result.err
    assert ("it holds no rows." if not text.strip() else "There is no picture") in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_the_help_names_every_shape():
    from typing import get_args

    from casa.cli.options import SHAPES
    from casa.data.settings import ShapeName

    assert get_args(ShapeName) == SHAPES


def test_json_with_a_models_tokens(casa, rows, checkpoint):
    result = casa("data", "check", rows, "--json", "--model", checkpoint)
    found = json.loads(result.out)
    assert (found["records"], found["bad"], found["reasons"]) == (2, 2, {"missing-picture": 1, "not-json": 1})
    assert found["statistics"]["text_tokens"]["least"] > 0
    assert found["statistics"]["image_tokens"]["least"] > 0


def test_a_sheet_and_a_report(casa, rows, tmp_path):
    result = casa("data", "check", rows, "--sheet", tmp_path / "sheet.html", "--report", tmp_path / "bad.jsonl")
    assert result.status == 0
    assert (tmp_path / "sheet.html").read_text().count("<article") == 2
    named = [json.loads(line)["origin"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert named == [f"{rows}:2", f"{rows}:4"]
    again = casa("data", "check", rows, "--report", tmp_path / "bad.jsonl")
    assert again.status == 2
    assert "exists already" in again.err


def test_columns_shape_root_and_limit(casa, rows, tmp_path):
    table = tmp_path / "elsewhere" / "t.csv"
    table.parent.mkdir()
    table.write_text("photo,title\n" + "a.png,A cat.\n" * 3)
    given = ("--column", "image=photo", "--column", "caption=title", "--root", tmp_path, "--shape", "caption")
    result = casa("data", "check", table, *given, "--limit", 2, "--json")
    found = json.loads(result.out)
    assert (found["records"], found["bad"], found["complete"]) == (2, 0, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.jsonl",), "There is no nowhere.jsonl"),
        (("owner/name",), "hub:owner/name"),
        (("{rows}", "--shape", "lava"), "did you mean 'llava'?"),
        (("{rows}", "--column", "photo"), "image=photo"),
        (("{rows}", "--fps", "0"), "fps is 0.0"),
        (("{rows}", "--sheet", "/no/folder/sheet.html"), "does not exist"),
        (("{rows}", "--sheet", "sheet.png"), "ends in .html"),
    ],
)
def test_mistakes_are_one_sentence(casa, rows, arguments, sentence):
    result = casa("data", "check", *(argument.format(rows=rows) for argument in arguments))
    assert result.status == 2
    assert sentence in result.err
    assert len(result.err.strip().splitlines()) == 1
