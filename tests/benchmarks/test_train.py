"""The training benchmark measures what it says: the same batch, the same samples, the same loss."""

import pytest
import torch

from casa.benchmarks import train_memory
from casa.benchmarks.train_memory import bench_train_memory, measure_step, memory_table
from casa.benchmarks.train_models import Case, fresh_model, most_square, packed_batch
from casa.benchmarks.train_packing import PROPORTIONED, bench_packing, packing_table
from casa.benchmarks.train_throughput import batches_of, bench_throughput, packs_of, throughput_table
from casa.errors import UserError
from casa.training.packs import Length
from casa.training.samples import Budget


def test_both_methods_train_on_the_same_batch():
    cases = [Case(method, image_tokens=16, text_tokens=16) for method in ("casa", "insertion")]
    models = [fresh_model(case.method) for case in cases]
    batches = [packed_batch(case, model) for case, model in zip(cases, models, strict=True)]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    # whatever insertion has, CASA has too
    named = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        assert parameter.shape == named[name].shape, name
    found = measure_step(cases[0])
    assert found["peak"] >= found["before"] > 0
    assert found["step"] == found["peak"] - found["before"]


def test_growth_is_compared(monkeypatch):
    def pretended(case):
        size = 100 + case.image_tokens * (2 if case.method == "casa" else 10)
        return {"before": 100, "peak": size, "step": size - 100, "loss": 1.0}

    monkeypatch.setattr(train_memory, "_apart", pretended)
    found = bench_train_memory(Case("casa", 16), [64, 16])
    assert [row["image_tokens"] for row in found["rows"]] == [16, 16, 64, 64]
    assert found["bytes_per_image_token"] == {"casa": 2, "insertion": 10}
    assert found["insertion_over_casa"] == {"step": {"16": 5.0, "64": 5.0}, "growth": 5.0}
    assert "64" in memory_table(found)


def test_packed_and_padded_have_the_same_loss():
    found = bench_throughput(samples=6, budget=Budget(text=96, image=96), rounds=1)
    assert found["loss"]["packed"] == pytest.approx(found["loss"]["padded"], rel=1e-5)
    slots = found["text_slots"]
    assert slots["packed"] == found["settings"]["text_tokens"] < slots["padded"]
    assert "packed over padded" in throughput_table(found)


def test_every_sample_is_in_one_pack_and_one_batch():
    lengths = [Length(5, 9), Length(5, 9), Length(2, 1), Length(10, 10)]
    packs = packs_of(lengths, Budget(text=10, image=20))
    assert sorted(index for pack in packs for index in pack) == [0, 1, 2, 3]
    assert batches_of(5, 2) == [[0, 1], [2, 3], [4]]


def test_every_kind_of_samples_is_packed():
    found = bench_packing(samples=400)
    assert set(found) == {PROPORTIONED, "image", "video", "live"}
    assert found[PROPORTIONED]["image_waste"] < found[PROPORTIONED]["padded_waste"]
    for row in found.values():
        assert row["least_text"] <= row["text_waste"]
        assert row["least_image"] <= row["image_waste"]
    assert packing_table(found).count("\n") == 5


@pytest.mark.parametrize(("tokens", "sides"), [(64, (8, 8)), (12, (3, 4)), (7, (1, 7)), (1, (1, 1))])
def test_pictures_are_as_square_as_can_be(tokens, sides):
    assert most_square(tokens) == sides


@pytest.mark.parametrize(
    "choice",
    [{"method": "other"}, {"image_tokens": 18}, {"text_tokens": 4}, {"samples": 0}],
)
def test_cases_that_cannot_be_are_refused(choice):
    with pytest.raises(UserError):
        Case(**({"method": "casa", "image_tokens": 16} | choice))
    with pytest.raises(UserError, match="two or more"):
        bench_train_memory(Case("casa", 16), [16, 16])
