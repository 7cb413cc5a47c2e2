"""The program run in this process, and a tiny random checkpoint for it."""

import sys
from dataclasses import dataclass

import pytest

from casa.cli.main import run
from casa.testing import tiny_checkpoint


@dataclass
class Result:
    """How a run of the program ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def casa(monkeypatch, capsys):
    """Runs `casa` with arguments and returns how it ended."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["casa", *map(str, arguments)])
        status = 0
        capsys.readouterr()  # what a test's own preparations said
        try:
            run()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model and its processor."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
