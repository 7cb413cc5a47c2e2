"""No test's verdict hangs on speed: what waits does so until it has come, or for PATIENCE, against hanging alone."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# calls that give up after a number of seconds, and how they are given it: by name, or as their only argument
NAMED = {"timeout", "open_timeout"}
ALONE = {"join", "wait", "settimeout", "result"}
# shorter ones are there to run out: something is not to come, or the code under test gives up by itself
WAITS = range(3, 1800)
CLOCKS = {"monotonic", "perf_counter"}


def hasty(tree: ast.AST) -> list[str]:
    """What in a file's code gives up after seconds of its own, or compares a measured time with some."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [word.value for word in node.keywords if word.arg in NAMED]
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            given += node.args if name in ALONE and len(node.args) == 1 else []
            if any(_seconds(value) for value in given):
                found.append(f"line {node.lineno}: {ast.unparse(node)[:90]}")
        if isinstance(node, ast.Compare) and any(map(_measured, (node.left, *node.comparators))):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:90]}")
    return found


def _seconds(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and int(node.value) in WAITS


def _measured(node: ast.AST) -> bool:
    """A difference from a clock's time."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Sub):
        return False
    calls = (part.func for part in ast.walk(node) if isinstance(part, ast.Call))
    return any(getattr(call, "attr", getattr(call, "id", "")) in CLOCKS for call in calls)


@pytest.mark.slow
def test_no_test_is_in_a_hurry():
    files = sorted(TESTS.rglob("*.py"))
    found = [f"{path.relative_to(TESTS)}, {line}" for path in files for line in hasty(ast.parse(path.read_text()))]
    assert not found, "\n".join(["wait for casa.testing.PATIENCE instead, or for what is to come:", *found])


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("thread.join(60)", 1),
        ("subprocess.run(command, timeout=300)", 1),
        ("assert time.monotonic() - began < 3", 1),
        ("assert 5 > perf_counter() - began", 1),
        ("thread.join(PATIENCE)", 0),
        ("thread.join()", 0),
        ("assert not came.wait(0.2)", 0),
        ("'-'.join(words)", 0),
        ("while time.monotonic() < end: pass", 0),
    ],
)
def test_the_look_can_fail(line, count):
    assert len(hasty(ast.parse(line))) == count
