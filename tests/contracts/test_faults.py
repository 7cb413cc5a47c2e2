"""The list of faults is kept in step with the code, and the script that makes them can tell one from none."""

import sys
from pathlib import Path

import pytest

import casa

FOLDER = Path(__file__).parents[1] / "mutation"
sys.path.insert(0, str(FOLDER))
import check  # noqa: E402
from check import copied, notices  # noqa: E402
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


@pytest.mark.slow
def test_a_fault_is_noticed_and_a_harmless_change_is_not(tmp_path):
    tree = copied(tmp_path)
    kept = (tree / "src" / "casa" / "windows.py").read_text()
    harmless = Fault("none", "windows.py", "def _long(", "def  _long(", ("test_windows.py",))
    assert notices(FAULTS[0], tree)
    assert (tree / "src" / "casa" / "windows.py").read_text() == kept, "the copy is as it was, for the next fault"
    assert not notices(harmless, tree)


def test_no_fault_is_looked_for_where_tests_fail_anyway(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "fail", lambda tests, tree: True)
    with pytest.raises(SystemExit, match="without any fault"):
        check.main("off by one")
    with pytest.raises(SystemExit, match="no fault has 'nothing'"):
        check.main("nothing")
