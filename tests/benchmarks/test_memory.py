"""Host memory of captioning does not grow with the film: six times the frames, measured in processes of their own."""

import pytest
import torch

from casa.benchmarks.apart import measured_apart
from casa.benchmarks.host_memory import forget_peak, most_bytes, peak_bytes, resident_bytes
from casa.benchmarks.memory import bench_memory, memory_table
from casa.benchmarks.turns_memory import turns_peaks, with_peaks
from casa.errors import UserError
from casa.models import adapt
from casa.testing import tiny_checkpoint, tiny_encoder, tiny_processor, tiny_text_model

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


def test_a_process_that_fails_is_told():
    with pytest.raises(UserError, match="dreaming in a process of its own failed"):
        measured_apart("a_module_that_is_nowhere", [], "dreaming")


def test_what_the_process_holds():
    before = resident_bytes()
    kept = torch.ones(30_000_000)
    assert resident_bytes() - before > 100e6
    # the system counts pages in batches
    assert peak_bytes() > resident_bytes() - 10e6
    del kept


def test_a_peak_can_be_forgotten():
    held = torch.ones(50_000_000)
    high = peak_bytes()
    del held
    forget_peak(torch.device("cpu"))
    assert peak_bytes() < high - 100e6
    assert most_bytes(torch.device("cpu")) == pytest.approx(peak_bytes(), rel=0.05)


def test_peaks_are_of_each_method_by_itself_without_loading(tmp_path):
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
