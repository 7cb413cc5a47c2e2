"""The list of faults is kept in step with the code, and the script that makes them can tell one from none."""

import sys
from pathlib import Path

import casa

FOLDER = Path(__file__).parents[1] / "mutation"
sys.path.insert(0, str(FOLDER))
from check import notices  # noqa: E402
from faults import FAULTS, Fault  # noqa: E402


def test_every_fault_has_its_place_and_its_tests():
    assert len(FAULTS) >= 10
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        text = (Path(casa.__file__).parent / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault.name
        assert fault.old != fault.new
        for test in fault.tests:
            assert (FOLDER.parent / test).is_file(), fault.name


def test_a_fault_is_noticed_and_a_harmless_change_is_not(tmp_path):
    harmless = Fault("none", "windows.py", "def _long(", "def _long(", ("test_windows.py",))
    assert notices(FAULTS[0], tmp_path / "one")
    assert not notices(harmless, tmp_path / "two")
