"""docs/adding-a-backbone.md does what it says: its code runs, and its example fits into a screen."""

import re
from pathlib import Path

from casa.models.backbones import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-backbone.md"


def test_the_page_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code.splitlines()) <= 55
    try:
        exec(compile(code, str(PAGE), "exec"), {})
        assert "granite" in FAMILIES
    finally:
        FAMILIES.pop("granite", None)


def test_the_page_names_what_is_there():
    from casa.models.backbones import Decoder, InsertionVLM

    names = re.findall(r"^\| `(\w+)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) >= 9
    assert not [name for name in names if not hasattr(Decoder, name) and not hasattr(InsertionVLM, name)]
