"""Every worker computes on one thread, and so does what it starts: they share the machine, and tiny tensors gain
nothing from more. What the user has set in the environment stays.

`pytest --record=FILE` writes how long the whole suite took, with its counts and where it was run.
"""

import gc
import json
import os
import re
import signal
from pathlib import Path
from time import monotonic

# before torch is loaded: its threads read this once, and spin while they wait unless told otherwise
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# equal products are equal to the last bit, wherever in memory their numbers lie; read by MKL at its first one
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import pytest
import torch

from casa.media import VideoWriter
from casa.provenance import provenance

torch.set_num_threads(1)
# what a shell starts in the background ignores Ctrl-C, and what nohup starts the end of a terminal; processes inherit
# that, and those of tests shall heed both
for name, heeded in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), heeded)

COUNTED = ("passed", "failed", "error", "skipped")
BEGUN = pytest.StashKey[float]()
FAST = "not slow and not browser"  # what `make test-fast` asks for
ALL_LEFT_OUT = re.compile(r"^pytestmark = (\[[^\]]*)?pytest\.mark\.(slow|browser)\b", re.MULTILINE)


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="write the suite's time and counts to this .json file")


def pytest_configure(config):
    config.stash[BEGUN] = monotonic()


def pytest_ignore_collect(collection_path, config):
    """A file all of whose tests are left out is not even read: Ray alone takes seconds to import."""
    fast = config.option.markexpr == FAST and collection_path.suffix == ".py"
    return True if fast and ALL_LEFT_OUT.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_finish(session):
    """What was imported by now stays to the end: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    if path := config.getoption("--record"):
        counts = {name: len(terminalreporter.stats.get(name, [])) for name in COUNTED}
        workers = {"workers": config.getoption("numprocesses", None), "seed": None}
        facts = {"suite": "make test", "seconds": round(monotonic() - config.stash[BEGUN]), **counts, **workers}
        path.write_text(json.dumps(facts | provenance(), indent=2) + "\n")


@pytest.fixture(scope="session")
def noise_film(tmp_path_factory):
    """Called with a number of seconds, gives a film of noise, 84 x 56 px and 10 frames a second."""

    def film(seconds):
        path = tmp_path_factory.mktemp("films") / "film.mp4"
        generator = np.random.default_rng(0)
        with VideoWriter(path, (84, 56), fps=10) as video:
            for _ in range(10 * seconds):
                video.write(generator.integers(0, 255, (56, 84, 3), dtype=np.uint8))
        return path

    return film
