"""Frames beside a neighbour: ratios within one run, and a machine that was not quiet is called so."""

import pytest

from casa.benchmarks import neighbour
from casa.benchmarks.neighbour import TORCH, WAYS, bench_neighbour, neighbour_summary, neighbour_table
from casa.benchmarks.settings import NeighbourSettings
from casa.errors import UserError
from casa.testing import tiny_checkpoint


def turns(others, **milliseconds):
    """Two rounds of every way. milliseconds: (quiet, busy) of ways that differ from 50 and 60."""
    made = {}
    for way in WAYS:
        quiet, busy = milliseconds.get(way.split()[0], (50.0, 60.0))
        made[way] = [
            {"quiet": [factor * quiet] * 3, "busy": [factor * busy] * 2 + [1000.0], "others": others}
            for factor in (1.0, 2.0)
        ]
    return made


def test_ratios_are_those_of_the_same_round():
    found = neighbour_summary(turns(0.02, casa=(52.0, 78.0), torch=(50.0, 700.0)))
    casa, torch = found["ways"]["casa"], found["ways"]["torch as it is"]
    assert (casa["slower_quiet"], casa["slower_busy"], casa["most_ms"]) == (1.04, 1.5, 1000.0)
    assert (torch["slower_quiet"], torch["slower_busy"]) == (1.0, 14.0)
    assert (casa["quiet_ms"], casa["busy_ms"]) == (78.0, 117.0)
    assert found["is_quiet"]
    assert "not quiet" not in neighbour_table(found)


def test_a_machine_that_is_not_quiet_is_called_so():
    found = neighbour_summary(turns(0.5))
    assert (found["is_quiet"], found["others_quiet"]) == (False, 0.5)
    assert "others used 0.50 cores" in neighbour_table(found)


@pytest.mark.slow
def test_it_runs_in_processes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbour, "WAYS", {TORCH: ({"OMP_NUM_THREADS": "1"}, False)})
    model = tiny_checkpoint(tmp_path / "model")
    found = bench_neighbour(NeighbourSettings(str(model), 224, rounds=1, seconds=0.01), warm=0.01)
    assert found.figures["ways"][TORCH]["slower_quiet"] == 1.0
    assert found.figures["ways"][TORCH]["most_ms"] > 0
    assert found.figures["others_quiet"] >= 0


def test_what_cannot_be_measured(tmp_path, monkeypatch):
    for wrong, words in (({"rounds": 0}, "rounds is 0; it must be 1 or more"), ({"seconds": 0.0}, "above 0")):
        with pytest.raises(UserError, match=words):
            NeighbourSettings(**wrong)
    monkeypatch.setattr("casa.threads.STAT", str(tmp_path / "none"))
    with pytest.raises(UserError, match="on Linux"):
        bench_neighbour(NeighbourSettings())
