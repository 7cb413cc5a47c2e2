"""The notebooks of examples/ run from beginning to end, and keep outputs that are small."""

import shutil
from pathlib import Path

import nbformat
import pytest

from casa.testing import PATIENCE

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
MOST_BYTES = 150_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_kept_whole_and_small(name):
    path = ROOT / "examples" / name
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.execution_count for cell in cells):
        pytest.skip("its outputs are not kept yet: make notebooks")
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run it from the top: make notebooks"
    )
    assert any(cell.outputs for cell in cells)
    assert not [
        out for cell in cells for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"
    ]
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "docs" / "images" / "page.png", tmp_path / "docs" / "images")
    notebook = nbformat.read(ROOT / "examples" / name, 4)
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", resources=resources).execute()
    assert list((tmp_path / "examples").iterdir()) == [], "nothing is left behind"
