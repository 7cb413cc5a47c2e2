"""The docs cannot lie: commands have the options that they name, the first pages run, the drawings are true."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

import casa
from casa.cli.main import app, run
from projects.pictures import DRAWINGS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in ("log.md", "changelog.md"))
FENCE = re.compile(r"^```(\w*)( no-run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what this file runs; the others have tests of their own, beside those of their rooms
FIRST = ("index.md", "concepts.md", "adapting.md", "real-models.md")


def blocks(page: str) -> list[tuple[str, bool, str]]:
    """Language, whether it runs, and text of each fenced block."""
    found = FENCE.findall((DOCS / page).read_text(encoding="utf-8"))
    return [(language, not kept, text.replace("\\\n", " ")) for language, kept, text in found]


def wrong(line: str) -> list[str]:
    """What a line `casa ...` names that the program does not know."""
    words = shlex.split(line, comments=True)[1:]
    command = get_command(app)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        if (word := words.pop(0)) not in command.commands:
            return [word]
        command = command.commands[word]
    options = [option for option in command.params if isinstance(option, TyperOption)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--help", "--version"}
    return [word for word in (word.partition("=")[0] for word in words) if word.startswith("--") and word not in known]


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_every_command_has_its_options(page):
    lines = [line.strip() for language, _, text in blocks(page) if language in ("", "sh") for line in text.splitlines()]
    for line in lines:
        for command in re.findall(r"(?:^|\| )(casa [a-z].*)", line):
            assert wrong(command) == [], command


def test_the_look_can_fail():
    assert wrong("casa ask casa-tiny page.png 'Read.' --temperatur 1") == ["--temperatur"]
    assert wrong("casa bench streem") == ["streem"]
    assert wrong("casa caption casa-tiny a.mp4 --every-frame  # --not-this") == []


@pytest.mark.parametrize("page", sorted(set(PAGES) - {*FIRST}))
def test_a_page_with_programs_has_a_test_that_runs_them(page):
    if any(runs and language in ("python", "sh") for language, runs, _ in blocks(page)):
        tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
        assert f'"{page}"' in tests


@pytest.mark.slow
@pytest.mark.parametrize("page", FIRST)
def test_the_first_pages_run(page, tmp_path, monkeypatch):
    shutil.copy(DOCS / "images" / "page.png", tmp_path)
    shutil.copy(Path(casa.__file__).parent / "assets" / "demo" / "clip.mp4", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, runs, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        for line in text.splitlines() if language == "sh" and runs else ():
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            with pytest.raises(SystemExit) as end:
                run()
            assert end.value.code in (0, None), line


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_those_that_the_code_draws(name):
    assert (DOCS / "images" / name).read_text(encoding="utf-8") == DRAWINGS[name]()
