"""Host memory of captioning does not grow with the film: six times the frames, measured in processes of their own."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
import torch

from casa.benchmarks import soak, stream
from casa.benchmarks.harness import handwriting, in_own_process, write_film
from casa.benchmarks.settings import MemorySettings, StreamSettings
from casa.benchmarks.soak import bench_memory
from casa.benchmarks.stream import peak_of_turns
from casa.errors import UserError
from casa.media import probe, read_frames
from casa.memory import max_memory_allocated, peak_resident_bytes, reset_peak_memory, resident_bytes
from casa.models import adapt
from casa.testing import tiny_checkpoint, tiny_encoder, tiny_processor, tiny_text_model

pytestmark = pytest.mark.skipif(not peak_resident_bytes(), reason="this system does not tell a process's memory")

# Each line on stdin is answered by a new process, forked from one that has imported all, and done nothing else.
FORKING = """
import json, os, sys, traceback
import casa.benchmarks.soak, casa.benchmarks.stream, sklearn.datasets
from casa.benchmarks.harness import answer
for line in sys.stdin:
    sys.argv[1:] = [line]
    if os.fork() == 0:
        try:
            answer()
        except BaseException:
            traceback.print_exc()
            print(json.dumps("failed"))
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.wait()
"""

MEASURING = """
import os
def measure(*given):
    print("some words")
    return {"process": os.getpid(), "given": given, "chosen": os.environ.get("CHOSEN")}
def fail():
    raise ValueError("a bad dream")
"""


@pytest.fixture(scope="module")
def forking() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture
def imported_once(forking, monkeypatch):
    """In place of `in_own_process`: processes of their own as well, but without seconds of imports for each."""

    def measured(function, *arguments):
        forking.stdin.write(json.dumps([function.__module__, function.__name__, arguments]) + "\n")
        forking.stdin.flush()
        found = json.loads(forking.stdout.readline())
        assert found != "failed", function
        return found

    for module in (soak, stream):
        monkeypatch.setattr(module, "in_own_process", measured)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.slow
def test_a_longer_film_takes_no_more_than_a_short_one(checkpoint, imported_once):
    """If watched frames were kept, 30 of 448 x 448 px would be 18 MB; if all decoded ones were, 36 MB."""
    settings = MemorySettings(str(checkpoint), 0.3, 0.05, size=448, film_fps=4.0, max_text_tokens=96)
    found = bench_memory(settings, max_new_tokens=2)
    assert [(row["decoded"], row["frames"]) for row in found.figures["films"]] == [(12, 6), (72, 36)]
    assert found.figures["more_bytes"] < 9e6  # from one run to the next a peak differs by less than 1e6
    assert found.table.count("\n") == 3


@pytest.mark.slow
def test_a_film_shows_a_new_picture_each_time_that_it_is_watched(tmp_path):
    assert write_film(tmp_path / "a.mp4", 4.0, 112, film_fps=25.0, fps=2.0, seed=0) == 100
    assert probe(tmp_path / "a.mp4").frames == 100
    pictures = [frame.picture.astype(int) for frame in read_frames(tmp_path / "a.mp4", fps=2.0)]
    wanted = [np.asarray(picture).astype(int) for picture in itertools.islice(handwriting(0, 112), 8)]
    assert len(pictures) == 8
    apart = np.array([[np.abs(seen - drawn).mean() for drawn in wanted] for seen in pictures])
    assert np.diag(apart) == pytest.approx(apart.min(axis=1)), "each is that of its own moment"
    assert apart.max() > 3 * apart.min(), "and not all are alike"


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"minutes": 1.0, "short": 1.0}, "short"), ({"short": 0.0}, "short"), ({"fps": 30.0}, "film_fps")],
)
def test_numbers_that_cannot_be(settings, word):
    with pytest.raises(UserError, match=word):
        bench_memory(MemorySettings(**settings))


@pytest.mark.slow
def test_a_process_of_its_own_is_told_and_answers_or_says_why_not(tmp_path, monkeypatch):
    (tmp_path / "measuring.py").write_text(MEASURING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    import measuring

    found = in_own_process(measuring.measure, "this", None, environment={**os.environ, "CHOSEN": "that"})
    assert (found["given"], found["chosen"]) == (["this", None], "that")
    assert found["process"] != os.getpid()
    with pytest.raises(UserError, match="a bad dream"):
        in_own_process(measuring.fail)


def test_what_the_process_holds():
    before = resident_bytes()
    kept = torch.ones(30_000_000)
    assert resident_bytes() - before > 100e6
    # the system counts pages in batches
    assert peak_resident_bytes() > resident_bytes() - 10e6
    del kept


def test_a_peak_can_be_forgotten():
    held = torch.ones(50_000_000)
    high = peak_resident_bytes()
    del held
    reset_peak_memory(torch.device("cpu"))
    assert peak_resident_bytes() < high - 100e6
    assert max_memory_allocated(torch.device("cpu")) == pytest.approx(peak_resident_bytes(), rel=0.05)


@pytest.mark.slow
def test_peaks_are_of_each_method_by_itself_without_loading(tmp_path, imported_once):
    """Wide keys: 96 KiB of float32 a token, so that insertion's 12 frames of 64 tokens are 75 MB in its cache."""
    torch.manual_seed(0)
    wide = tiny_text_model(dtype=torch.float32, num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    tower = tiny_encoder(dtype=torch.float32)
    model = adapt(wide, vision=tower)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    settings = asdict(StreamSettings(str(tmp_path), frames=12, size=224, tokens=2, device="cpu"))
    peaks = {method: stream.in_own_process(peak_of_turns, settings, method) for method in ("casa", "insertion")}
    token = 2 * 3 * 32 * 128 * 4
    difference = 11 * 64 * token
    assert difference > 60e6
    assert peaks["insertion"] - peaks["casa"] > difference / 2
    # what loading took is in neither: a frame's worth of keys, and what passes through the tower
    assert 0 < peaks["casa"] < difference
