"""What is public at the top of the package: listed once, importable by name, documented, typed, and cheap to import."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import casa
from casa.testing import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
DOCS = "\n".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
HOMES = {name: module for module, names in casa.EXPORTS.items() for name in names}


def test_the_list_the_typed_imports_and_all_agree():
    assert sorted(HOMES) == sorted(casa.__all__)
    tree = ast.parse(Path(casa.__file__).read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name: node.module for node in typed.body for alias in node.names} == HOMES
    assert set(casa.__all__) <= set(dir(casa))


@pytest.mark.parametrize("name", casa.__all__)
def test_every_public_name_is_there_documented_and_told_of_in_the_docs(name):
    found = getattr(casa, name)
    assert found.__module__.startswith("casa.")
    text = inspect.getdoc(found)
    assert text
    assert text.splitlines()[0].endswith((".", ":"))
    assert name in DOCS


@pytest.mark.parametrize(
    "name", ["load", "train", "evaluate", *(f"CasaPipeline.{way}" for way in ("ask", "stream", "watch"))]
)
def test_the_front_door_documents_every_argument(name):
    found = casa
    for part in name.split("."):
        found = getattr(found, part)
    text = inspect.getdoc(found)
    arguments = [argument for argument in inspect.signature(found).parameters if argument != "self"]
    said = text.split("Args:")[1]
    assert [argument for argument in arguments if f"    {argument}: " not in said] == []
    assert "Returns:" in text or "Yields:" in text
    assert "Raises:" in text


@pytest.mark.parametrize("room", casa.ROOMS)
def test_rooms_are_at_hand_without_an_import(room):
    assert getattr(casa, room).__name__ == f"casa.{room}"
    assert f"`casa.{room}`" in DOCS


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = casa.nothing


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import casa, sys; print(sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'transformers', 'PIL'}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout == "[]\n", result.stderr
