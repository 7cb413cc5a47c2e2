"""The page about serving cannot lie: its code runs, and it names every message and event that there is."""

import re
from dataclasses import fields
from pathlib import Path

from casa.serving import Limits
from casa.serving.metrics import COUNTERS, GAUGES
from casa.serving.streams import KEYS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")


def test_an_app_of_ones_own(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(blocks[0], "serving.md", "exec"), names)
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
    names["server"]._socket.close()
    for block in blocks[1:]:
        compile(block, "serving.md", "exec")


def test_every_message_and_event_is_named():
    for kind in KEYS:
        assert f'"type": "{kind}"' in PAGE
    source = "".join(path.read_text() for path in (ROOT / "src/casa/serving").glob("*.py"))
    for kind in set(re.findall(r'\{\s*"type": "(\w+)"', source)) - {"text", "image"}:
        assert f"`{kind}`" in PAGE or f'"{kind}"' in PAGE, kind


def test_every_limit_is_named_with_its_default():
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d,.]+) \|", PAGE, re.MULTILINE))
    defaults = {field.name: field.default for field in fields(Limits)}
    assert {name: float(value.replace(",", "")) for name, value in table.items()} == defaults


def test_every_metric_is_named():
    for name in [*(f"{name}_total" for name in COUNTERS), *GAUGES, "lag_seconds"]:
        assert f"`casa_{name}`" in PAGE


def test_every_option_is_named():
    source = (ROOT / "src/casa/cli/live.py").read_text().partition("def serve(")[2]
    for name in re.findall(r"^    (\w+): Annotated", source, re.MULTILINE):
        assert f"`--{name.replace('_', '-')}`" in PAGE
