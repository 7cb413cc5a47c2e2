"""Host memory of captioning does not grow with the film: six times the frames, measured in processes of their own."""

import pytest
import torch

from casa.benchmarks.host_memory import peak_bytes, resident_bytes
from casa.benchmarks.memory import bench_memory, memory_table
from casa.benchmarks.turns_memory import turns_peaks, with_peaks
from casa.errors import UserError
from casa.testing import tiny_checkpoint

pytestmark = pytest.mark.skipif(not peak_bytes(), reason="this system does not tell a process's memory")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_longer_film_takes_no_more_than_a_short_one(checkpoint):
    """If frames were kept, 60 of 448 x 448 px would be 36 MB."""
    found = bench_memory(str(checkpoint), minutes=0.6, short_minutes=0.1, size=448, max_text_tokens=96)
    assert [row["frames"] for row in found["films"]] == [12, 72]
    assert found["more_bytes"] < 20e6
    assert memory_table(found).count("\n") == 3


@pytest.mark.parametrize("settings", [{"minutes": 1.0, "short_minutes": 1.0}, {"short_minutes": 0.0}])
def test_lengths_that_cannot_be(settings):
    with pytest.raises(UserError, match="short"):
        bench_memory("casa-tiny", **settings)


def test_a_process_that_fails_is_told(tmp_path):
    with pytest.raises(UserError, match="process of its own failed"):
        bench_memory(str(tmp_path), minutes=0.1, short_minutes=0.05, size=56)


def test_what_the_process_holds():
    before = resident_bytes()
    kept = torch.ones(30_000_000)
    assert resident_bytes() - before > 100e6
    # the system counts pages in batches
    assert peak_bytes() > resident_bytes() - 10e6
    del kept


def test_peaks_are_of_each_method_by_itself(checkpoint):
    peaks = turns_peaks(str(checkpoint), "cpu", turns=4, tokens=2, size=224)
    assert min(peaks.values()) > 0
    summary = with_peaks({"casa": {"turns": 12}, "insertion": {"turns": 12}}, peaks)
    assert summary["insertion"]["peak_bytes"] == peaks["insertion"]
    with pytest.raises(UserError, match="casa in a process of its own failed"):
        turns_peaks(str(checkpoint), "tpu", turns=1, tokens=2, size=448)
