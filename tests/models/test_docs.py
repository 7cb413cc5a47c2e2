"""docs/models.md: its programs run, in one folder with a page in it."""

import re
from pathlib import Path

import numpy as np
import pytest

from casa.evaluation import page

GUIDE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_programs_run(tmp_path, monkeypatch, capsys):
    drawn = page(np.random.default_rng(3), "held_out", sizes=[(224, 224)])
    drawn.image.save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for text in PROGRAMS:
        exec(compile(text, "docs/models.md", "exec"), names)
    answers = capsys.readouterr().out.split("\n")
    # asked twice, with the picture looked at once
    assert answers[0] == answers[1]
    assert answers[0].isdigit()
