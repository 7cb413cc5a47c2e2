"""One meaning per class name in the whole package, and no command-line option named outside the command line."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import casa

SOURCE = Path(casa.__file__).parent
TWICE: dict[str, str] = {}  # class name -> why it may be defined in several files
# options of other programs
FOREIGN = {"provenance.py": "git's", "models/backbone_source.py": "pip's"}


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def repeated(root: Path) -> dict[str, list[str]]:
    """Names of classes that are defined more than once, and where."""
    places = defaultdict(list)
    for file, tree in trees(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file)
    return {name: files for name, files in places.items() if len(files) > 1 and name not in TWICE}


def options(root: Path) -> list[str]:
    """Places outside the command line whose texts, apart from docstrings, name an option."""
    found = []
    for file, tree in trees(root):
        if file.startswith("cli/") or file in FOREIGN:
            continue
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found += [f"{file}:{node.lineno}"] if re.search(r"(?<![\w<-])--[a-z]", node.value) else []
    return found


def test_a_class_name_means_one_thing():
    assert repeated(SOURCE) == {}


def test_the_library_names_no_option():
    assert options(SOURCE) == []


def test_the_looks_can_fail(tmp_path):
    (tmp_path / "a.py").write_text("class Turn: pass\n")
    (tmp_path / "b.py").write_text('"""Go on with --resume."""\n\nclass Turn:\n    text = "give --fps"\n')
    assert repeated(tmp_path) == {"Turn": ["a.py", "b.py"]}
    assert options(tmp_path) == ["b.py:4"]
