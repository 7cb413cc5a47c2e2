"""Host memory of captioning does not grow with the film: six times the frames, measured in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from casa.benchmarks import memory, turns_memory
from casa.benchmarks.apart import measured_apart
from casa.benchmarks.memory import bench_memory, draw_film, memory_table
from casa.benchmarks.soak import film
from casa.benchmarks.turns_memory import turns_peaks, with_peaks
from casa.errors import UserError
from casa.media import probe, read_frames
from casa.memory import max_memory_allocated, peak_resident_bytes, reset_peak_memory, resident_bytes
from casa.models import adapt
from casa.testing import tiny_checkpoint, tiny_encoder, tiny_processor, tiny_text_model

pytestmark = pytest.mark.skipif(not peak_resident_bytes(), reason="this system does not tell a process's memory")

# Each line on stdin is answered by a new process, forked from one that has imported all, and done nothing else.
FORKING = """
import json, os, sys, traceback
import casa.benchmarks.memory, casa.benchmarks.turns_memory, sklearn.datasets
for line in sys.stdin:
    module, sys.argv[1:] = json.loads(line)
    if os.fork() == 0:
        try:
            sys.modules[module].child()
        except BaseException:
            traceback.print_exc()
            print(json.dumps("failed"))
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.wait()
"""

MEASURING = """
import json, os
from casa.benchmarks.apart import told
def child():
    print("some words")
    print(json.dumps({"process": os.getpid(), "told": told()}))
"""


@pytest.fixture(scope="module")
def forking() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture
def imported_once(forking, monkeypatch):
    """In place of `measured_apart`: processes of their own as well, but without seconds of imports for each."""

    def measured(module, given, what):
        forking.stdin.write(json.dumps([module, [json.dumps(given)]]) + "\n")
        forking.stdin.flush()
        found = json.loads(forking.stdout.readline())
        assert found != "failed", what
        return found

    for module in (memory, turns_memory):
        monkeypatch.setattr(module, "measured_apart", measured)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_longer_film_takes_no_more_than_a_short_one(checkpoint, imported_once):
    """If watched frames were kept, 30 of 448 x 448 px would be 18 MB; if all decoded ones were, 36 MB."""
    settings = {"size": 448, "film_fps": 4.0, "max_text_tokens": 96, "max_new_tokens": 2}
    found = bench_memory(str(checkpoint), minutes=0.3, short_minutes=0.05, **settings)
    assert [(row["decoded"], row["frames"]) for row in found["films"]] == [(12, 6), (72, 36)]
    assert found["more_bytes"] < 9e6  # from one run to the next a peak differs by less than 1e6
    assert memory_table(found).count("\n") == 3


def test_a_film_shows_a_new_picture_each_time_that_it_is_watched(tmp_path):
    assert draw_film(tmp_path / "a.mp4", 4.0, 112, film_fps=25.0, fps=2.0) == 100
    assert probe(tmp_path / "a.mp4").frames == 100
    pictures = [frame.picture.astype(int) for frame in read_frames(tmp_path / "a.mp4", fps=2.0)]
    wanted = [np.asarray(picture).astype(int) for picture in film(112, 0, 8)]
    assert len(pictures) == 8
    apart = np.array([[np.abs(seen - drawn).mean() for drawn in wanted] for seen in pictures])
    assert np.diag(apart) == pytest.approx(apart.min(axis=1)), "each is that of its own moment"
    assert apart.max() > 3 * apart.min(), "and not all are alike"


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"minutes": 1.0, "short_minutes": 1.0}, "short"), ({"short_minutes": 0.0}, "short"), ({"fps": 30.0}, "film fps")],
)
def test_numbers_that_cannot_be(settings, word):
    with pytest.raises(UserError, match=word):
        bench_memory("casa-tiny", **settings)


def test_a_process_that_fails_is_told():
    with pytest.raises(UserError, match="dreaming in a process of its own failed"):
        measured_apart("a_module_that_is_nowhere", [], "dreaming")


def test_a_process_of_its_own_is_told_and_answers(tmp_path, monkeypatch):
    (tmp_path / "measuring.py").write_text(MEASURING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = measured_apart("measuring", ["this", None], "a test")
    assert found["told"] == ["this", None]
    assert found["process"] != os.getpid()


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


def test_peaks_are_of_each_method_by_itself_without_loading(tmp_path, imported_once):
    """Wide keys: 96 KiB of float32 a token, so that insertion's 12 frames of 64 tokens are 75 MB in its cache."""
    torch.manual_seed(0)
    wide = tiny_text_model(dtype=torch.float32, num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    tower = tiny_encoder(dtype=torch.float32)
    model = adapt(wide, vision=tower)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    peaks = turns_peaks(str(tmp_path), "cpu", turns=12, tokens=2, size=224)
    token = 2 * 3 * 32 * 128 * 4
    difference = 11 * 64 * token
    assert difference > 60e6
    assert peaks["insertion"] - peaks["casa"] > difference / 2
    # what loading took is in neither: a frame's worth of keys, and what passes through the tower
    assert 0 < peaks["casa"] < difference
    summary = with_peaks({"casa": {"turns": 12}, "insertion": {"turns": 12}}, peaks)
    assert summary["insertion"]["peak_bytes"] == peaks["insertion"]
