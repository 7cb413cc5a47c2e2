"""docs/adding-a-backbone.md and docs/adding-an-encoder.md do what they say: their code runs, and fits into a screen."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from casa.models import backbones
from casa.vision import EncoderSpec
from casa.vision.encoder import SPECS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "adding-a-backbone.md": (backbones.FAMILIES, "granite"),
    "adding-an-encoder.md": (SPECS, "my_convnet"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code.splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    families, name = PAGES[page]
    try:
        exec(compile(code, page, "exec"), {})
        assert name in families
    finally:
        families.pop(name, None)


def test_the_pages_name_what_is_there():
    from casa.models.backbones import Decoder, InsertionVLM

    names = re.findall(r"^\| `(\w+)", (DOCS / "adding-a-backbone.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) >= 9
    assert not [name for name in names if not hasattr(Decoder, name) and not hasattr(InsertionVLM, name)]
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "adding-an-encoder.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    said = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert said == {field.name for field in fields(EncoderSpec)}
