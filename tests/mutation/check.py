"""`make mutations`: makes every fault of `faults.py` in a copy of the package; its tests must fail there.

Run as: python tests/mutation/check.py [part of a fault's name]
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]


def notices(fault: Fault, folder: Path) -> bool:
    """Whether a test fails once the fault is in. `folder` gets a copy of the package."""
    source = folder / "src"
    shutil.copytree(ROOT / "src", source)
    file = source / "casa" / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{fault.name}: its place stands {text.count(fault.old)} times in {fault.file}; mend the list."
        )
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / test) for test in fault.tests]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # 1: tests ran and some failed; anything else is no finding of a test
    if done.returncode not in (0, 1):
        raise SystemExit(f"{fault.name}: the tests could not run.\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main(part: str = "") -> int:
    missed = 0
    for fault in (fault for fault in FAULTS if part in fault.name):
        with tempfile.TemporaryDirectory() as folder:
            seen = notices(fault, Path(folder))
        missed += not seen
        print(f"{'noticed' if seen else 'MISSED '}  {fault.name}", flush=True)
    print("every fault is noticed" if not missed else f"{missed} faults go unnoticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
