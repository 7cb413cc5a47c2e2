"""What the Makefile and the program leave in the checkout is not part of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["/demo/", "/runs/", "/data/", ".venv/", "/.venv-lowest/", "__pycache__/", "*.egg-info/"]
)
def test_it_is_ignored(name):
    assert name in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
