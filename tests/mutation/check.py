"""`make mutations`: makes every fault of `faults.py`, one by one, in a copy of the tree; its tests must fail there.

Run as: python tests/mutation/check.py [part of a fault's name]

The tree itself is only read, once, so that it may be worked on meanwhile. The tests pass in the copy before the first
fault is made; else a test that fails anyway would pass for one that notices.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "docs", "recipes", "pyproject.toml", "Makefile")


def copied(folder: Path) -> Path:
    """The package, its tests and what they read, in a new folder below `folder`."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tree / name)
    return tree


def fail(tests: Iterable[str], tree: Path) -> bool:
    """Whether one of these tests, paths below tests, fails against the package in the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += [str(tree / "tests" / test) for test in tests]
    path = os.pathsep.join([str(tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    # 1: tests ran and some failed; anything else is no finding of a test
    if done.returncode not in (0, 1):
        raise SystemExit(f"the tests could not run.\n{done.stdout[-2000:]}")
    return done.returncode == 1


def notices(fault: Fault, tree: Path) -> bool:
    """Whether a test fails while the fault is in the copy."""
    file = tree / "src" / "casa" / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: its place stands {text.count(fault.old)} times in {fault.file}; mend the list."
        )
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return fail(fault.tests, tree)
    finally:
        file.write_text(text, encoding="utf-8")


def main(part: str = "") -> int:
    chosen = [fault for fault in FAULTS if part in fault.name]
    if not chosen:
        raise SystemExit(f"no fault has {part!r} in its name.")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        if fail(sorted({test for fault in chosen for test in fault.tests}), tree):
            raise SystemExit("tests fail without any fault; mend them first.")
        for fault in chosen:
            seen = notices(fault, tree)
            missed += not seen
            print(f"{'noticed' if seen else 'MISSED '}  {fault.name}", flush=True)
    print(f"all of {len(chosen)} faults are noticed" if not missed else f"{missed} faults go unnoticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
