"""Every worker computes on one thread: two of them share the machine, and tiny tensors gain nothing from more.

`pytest --record FILE` writes how long the whole suite took, with its counts and where it was run.
"""

import json
from pathlib import Path
from time import monotonic

import pytest
import torch

from casa.provenance import provenance

torch.set_num_threads(1)

COUNTED = ("passed", "failed", "error", "skipped")
BEGUN = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="write the suite's time and counts to this .json file")


def pytest_configure(config):
    config.stash[BEGUN] = monotonic()


def pytest_terminal_summary(terminalreporter, config):
    if path := config.getoption("--record"):
        counts = {name: len(terminalreporter.stats.get(name, [])) for name in COUNTED}
        workers = {"workers": config.getoption("numprocesses", None), "seed": None}
        facts = {"suite": "make test", "seconds": round(monotonic() - config.stash[BEGUN]), **counts, **workers}
        path.write_text(json.dumps(facts | provenance(), indent=2) + "\n")
