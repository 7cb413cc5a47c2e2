"""What the Makefile and the program leave in the checkout is not part of it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT = (
    "demo/captions.srt",
    "runs/x/log.json",
    "data/tiny/pages.tar",
    ".venv/installed",
    ".venv/demo",
    ".venv-lowest/installed",
    "src/casa/__pycache__/x.pyc",
    "src/casa_vlm.egg-info/PKG-INFO",
    ".hypothesis/x",
    ".pytest_cache/x",
    ".ruff_cache/x",
)
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a checkout of git's"
)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An empty checkout: in this one `.venv` may be a link, behind which git does not look."""
    place = tmp_path_factory.mktemp("checkout")
    subprocess.run(["git", "init", "--quiet", place], check=True)
    shutil.copy(ROOT / ".gitignore", place)
    return place


@pytest.mark.parametrize("name", LEFT)
def test_it_is_ignored(name, empty):
    assert subprocess.run(["git", "check-ignore", "--quiet", name], cwd=empty, check=False).returncode == 0


def test_what_is_written_is_not(empty):
    done = subprocess.run(["git", "check-ignore", "src/casa/windows.py", "src/casa/data/x.py"], cwd=empty, check=False)
    assert done.returncode == 1
