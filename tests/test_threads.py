"""Threads follow the cores that are free: taken away at once beside a busy process, given back when it has gone."""

import subprocess
import sys
import threading

import pytest

from casa import threads
from casa.threads import Sharing, share_cores, used_seconds


class Machine:
    """Cores, and a backend with threads of its own for every thread; time passes when a test says so."""

    def __init__(self, cores, most):
        self.now = self.used = self.own = 0.0
        self.most, self._local = most, threading.local()
        self.sharing = Sharing(cores, lambda: self.used, lambda: self.own, lambda: self.now, self)

    def get_num_threads(self):
        return getattr(self._local, "count", self.most)

    def set_num_threads(self, count):
        self._local.count = count

    def work(self, seconds, others, own=1.0):
        """The threads at the end of a time in which others used so many cores."""
        self.now += seconds
        self.own += own * seconds
        self.used += (own + others) * seconds
        self.sharing.settle()
        return self.get_num_threads()


@pytest.mark.parametrize(
    ("cores", "most", "others", "found"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.3, 2),
        (2, 2, 0.7, 1),
        (2, 2, 1.0, 1),
        (2, 2, 5.0, 1),
        (8, 8, 1.0, 7),
        (8, 8, 6.9, 1),
        (8, 4, 3.0, 4),  # threads for half the cores, as on machines with two to a core
        (8, 4, 5.5, 2),
        (1, 1, 0.0, 1),
    ],
)
def test_a_thread_for_each_core_that_is_free(cores, most, others, found):
    machine = Machine(cores, most)
    assert machine.work(0.0, 0) == most
    assert machine.work(0.6, others) == found


def test_they_come_back_once_it_has_been_quiet_twice():
    machine = Machine(2, 2)
    machine.work(0.0, 0)
    assert [machine.work(0.6, others) for others in (1.0, 0.0, 0.0, 0.0)] == [1, 1, 2, 2]
    assert [machine.work(0.6, others) for others in (1.0, 0.0, 0.3, 0.0, 0.0)] == [1, 1, 1, 1, 2]


def test_a_look_takes_a_while_and_a_thread_that_comes_later_is_told_too():
    machine = Machine(2, 2)
    machine.work(0.0, 0)
    assert [machine.work(0.2, 1.0) for _ in range(3)] == [2, 2, 1]
    told = []
    other = threading.Thread(target=lambda: told.append(machine.work(0.0, 0)))
    other.start()
    other.join()
    assert told == [1]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS"])
def test_who_has_chosen_is_left_alone(name):
    assert share_cores({"PATH": "", name: "1"}) is None
    assert threads._sharing is None


@pytest.mark.parametrize("text", ["", "cpu  1 2 3\nintr 5\n", "cpu0 1 2\n", "cpu0 a b c d e f g h\n"])
def test_a_system_that_does_not_tell_is_left_alone(tmp_path, monkeypatch, text):
    path = tmp_path / "stat"
    monkeypatch.setattr(threads, "STAT", str(path))
    assert share_cores({}) is None
    path.write_text(text)
    assert share_cores({}) is None
    assert threads._sharing is None


def test_the_cores_that_this_process_may_use_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "stat"
    path.write_text("cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 0 20 999 999 1 2 3 50 0\ncpu1 900 0 0 0 0 0 0 0 0 0\nintr 1\n")
    monkeypatch.setattr(threads, "STAT", str(path))
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)
    assert used_seconds({0}) == pytest.approx(1.26)
    assert used_seconds({0, 1}) == pytest.approx(10.26)


@pytest.mark.slow
def test_the_program_shares_its_cores_and_the_library_does_not():
    """In processes of their own, without the variables that the tests run under."""
    script = """
import os, sys
for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))]:
    del os.environ[name]
import casa, casa.threads
assert casa.threads._sharing is None
from casa.cli import main
sys.argv = ["casa", "--help"]
try:
    main.run()
except SystemExit:
    pass
shares = casa.threads._sharing is not None
assert shares == (casa.threads.share_cores() is not None)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
