"""docs/inspect.md: its commands and programs run, in one folder, and it names every ablation."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from casa.analysis import ABLATIONS
from casa.cli.main import run
from casa.evaluation import page
from casa.media import VideoWriter

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.M | re.S) for line in block.splitlines()]
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.M | re.S)


def test_every_ablation_is_told():
    told = re.findall(r"^\| `([a-z-]+)[^`]*` \|", GUIDE, re.M)
    assert told == list(dict.fromkeys(told))
    assert set(told) == set(ABLATIONS)


def test_the_figures_are_those_of_the_record():
    scores = json.loads((ROOT / "docs" / "results" / "inspect-casa-tiny.json").read_text())["scores"]
    told = re.findall(r"^\| ([a-z' ]+) \| ([\d.]+) % \| (-[\d.]+) \|$", GUIDE, re.M)
    names = ("whole", "no-self-attention", "no-random-text", "no-images")
    wanted = [(f"{100 * scores[name]['exact']:.1f}", f"{scores[name]['log_likelihood']:.3f}") for name in names]
    assert [(exact, chance) for _, exact, chance in told] == wanted


@pytest.mark.slow
def test_the_commands_and_programs_run(tmp_path, monkeypatch, capsys):
    drawn = [page(np.random.default_rng(number), "held_out", sizes=[(168, 168)]) for number in range(2)]
    drawn[0].image.save(tmp_path / "page.png")
    rows = []
    for number, one in enumerate(drawn):
        one.image.save(tmp_path / f"{number}.png")
        rows += [{"image": f"{number}.png", "question": t.question, "answer": t.answer} for t in one.turns[:2]]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with VideoWriter(tmp_path / "film.mp4", (168, 168), fps=1) as film:
        for _ in range(4):
            film.write(np.asarray(drawn[0].image))
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        # as small as it can be
        monkeypatch.setattr(sys, "argv", shlex.split(command.replace("--limit 20", "--limit 1")))
        with pytest.raises(SystemExit) as end:
            run()
        assert end.value.code == 0, command
    out = capsys.readouterr().out
    assert {"report.html", "film.html", "other.html", "statistics"} < {path.name for path in tmp_path.iterdir()}
    assert "questions" in out
    names: dict = {}
    for text in PROGRAMS:
        exec(compile(text, "docs/inspect.md", "exec"), names)
    assert names["weights"].shape[:2] == names["shares"].shape[1:3]
