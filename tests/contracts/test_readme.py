"""The README cannot lie: its code runs, its map names what is there, its picture and commands exist."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_five_lines_run(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    answer, *captions = capsys.readouterr().out.strip().split("\n")
    assert answer == "797"  # what is written there
    assert len(captions) > 3
    assert all(re.fullmatch(r" *\d+\.\d s  \S.*", caption) for caption in captions)


def test_the_map_names_every_room_and_file_of_the_package():
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    block = next(part for part in blocks if part.startswith("src/casa/"))
    lines = re.findall(r"^  ([a-z].*)", block, re.MULTILINE)
    named = [name for line in lines for name in line.split("  ")[0].split(", ")]
    there = {f"{path.name}/" for path in (ROOT / "src/casa").iterdir() if path.is_dir() and path.name[0] != "_"}
    there |= {path.name for path in (ROOT / "src/casa").glob("[a-z]*.py")}
    assert sorted(named) == sorted(there)
    for place in re.findall(r"^(?:    )?([\w./]+/)", block, re.MULTILINE):
        assert (ROOT / place).is_dir() or any((ROOT / "src/casa").glob(f"*/{place}")), place


def test_pictures_and_commands_exist():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{command}:" in makefile


def test_it_is_short_and_its_moving_picture_small():
    assert len(README.splitlines()) < 120
    (moving,) = re.findall(r"\((docs/images/[\w.-]+\.webp)\)", README)
    assert (ROOT / moving).stat().st_size < 2_000_000
    with Image.open(ROOT / moving) as opened:
        assert opened.n_frames > 50


def test_how_long_the_suite_takes_is_what_was_measured():
    record = json.loads((ROOT / "docs/results/suite-cpu.json").read_text(encoding="utf-8"))
    assert f"{record['passed']:,} tests took {record['seconds']} s on two cores." in README
