"""The training benchmark measures what it says: the same batch, the same samples, the same loss; and what it claims."""

from types import SimpleNamespace

import pytest
import torch

from casa.benchmarks import train
from casa.benchmarks.packing import SampleLength
from casa.benchmarks.settings import METHODS as NAMES
from casa.benchmarks.settings import TrainSettings
from casa.benchmarks.train import (
    IMAGE_STAGE,
    KINDS,
    METHODS,
    PROPORTIONED,
    RandomSamples,
    bench_train,
    drawn_lengths,
    fresh_model,
    kept_bytes,
    measure_step,
    memory_table,
    most_square,
    packing,
    packing_table,
    step_batch,
    text_slots,
    throughput,
    throughput_table,
    train_memory,
    ways_of,
)
from casa.errors import UserError
from casa.training.config import TokenBudget


@pytest.mark.slow
def test_every_method_trains_on_the_same_batch():
    assert tuple(METHODS) == NAMES
    models = {method: fresh_model(method) for method in METHODS}
    batches = [step_batch(TrainSettings(text_tokens=16), model, 16) for model in models.values()]
    for batch in batches:
        assert batch.keys() == batches[0].keys()
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch)
    # whatever insertion has, the others have too
    for method, model in models.items():
        assert model.fusion == METHODS[method]
        named = dict(model.named_parameters())
        for name, parameter in models["insertion"].named_parameters():
            assert parameter.shape == named[name].shape, (method, name)


def test_a_step_is_measured():
    found = measure_step({"text_tokens": 16, "device": "cpu"}, "casa", 16)
    assert found["peak"] >= found["before"] > 0
    assert found["step"] == found["peak"] - found["before"]
    assert 0 < found["kept"] < found["peak"]


def kept(method, *image_tokens):
    model = fresh_model(method)
    return [kept_bytes(model, step_batch(TrainSettings(text_tokens=64), model, count)) for count in image_tokens]


@pytest.mark.slow
def test_less_is_kept_for_the_backward_pass_than_by_insertion_and_grows_slower():
    """No clock and no allocator: every storage that autograd holds, counted once."""
    sizes = {method: kept(method, 64, 256) for method in METHODS}
    assert kept("casa", 64) == sizes["casa"][:1]
    growth = {method: more - fewer for method, (fewer, more) in sizes.items()}
    for method in set(METHODS) - {"insertion"}:
        assert sizes[method][1] < sizes["insertion"][1]
        assert growth[method] < growth["insertion"]
    assert sizes["casa"][0] < sizes["insertion"][0]
    # measured: 2.4
    assert growth["insertion"] > 2 * growth["casa"]


def test_what_is_kept_is_counted_by_hand():
    """A linear layer keeps its input and a square its own; neither weights nor views of the same storage count."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 4)

        def forward(self, x, use_cache):
            hidden = self.layer(x)
            return SimpleNamespace(loss=(hidden**2 + hidden[:, :1] * hidden[:, 1:2]).sum())

    assert kept_bytes(Model(), {"x": torch.randn(3, 8)}) == 4 * (3 * 8 + 3 * 4)


def test_growth_is_compared(monkeypatch):
    def pretended(function, settings, method, image_tokens):
        assert function is measure_step
        assert settings["image_tokens"] == (64, 16)
        size = 100 + image_tokens * {"insertion": 10, "casa": 2, "replace": 1}[method]
        return {"before": 100, "peak": size, "step": size - 100, "kept": 2 * size, "loss": 1.0}

    monkeypatch.setattr(train, "in_own_process", pretended)
    found = train_memory(TrainSettings(image_tokens=(64, 16), methods=("casa", "replace", "insertion")))
    assert [row["image_tokens"] for row in found["rows"]] == [16] * 3 + [64] * 3
    assert found["bytes_per_image_token"] == {
        "peak": {"casa": 2, "replace": 1, "insertion": 10},
        "kept": {"casa": 4, "replace": 2, "insertion": 20},
    }
    assert found["insertion_over"]["casa"] == {
        "step": {"16": 5.0, "64": 5.0},
        "kept": {"16": 1.97, "64": 3.25},
        "growth of peak": 5.0,
        "growth of kept": 5.0,
    }
    assert found["insertion_over"]["replace"]["growth of peak"] == 10
    assert "64" in memory_table(found)
    alone = train_memory(TrainSettings(image_tokens=(64, 16), methods=("casa",)))
    assert "insertion_over" not in alone


@pytest.mark.slow
def test_packed_and_padded_have_the_same_loss():
    budgets = {kind: TokenBudget(text=96, image=960) for kind in KINDS}
    found = throughput(TrainSettings(drawn=16, rounds=1, device="cpu"), draws=2, budgets=budgets)
    for kind in KINDS:
        row = found["kinds"][kind]
        first, second = row["draws"]
        assert first["text_tokens"] != second["text_tokens"]
        assert row["packed_over_padded"] == pytest.approx(
            (first["packed_over_padded"] + second["packed_over_padded"]) / 2, abs=0.01
        )
        for draw in row["draws"]:
            assert draw["loss"]["packed"] == pytest.approx(draw["loss"]["padded"], rel=1e-5)
            assert draw["text_slots"]["packed"] == draw["text_tokens"] < draw["text_slots"]["padded"]
        assert kind in throughput_table(found)


def test_the_image_stage_shows_text_alone_too():
    lengths = drawn_lengths(IMAGE_STAGE, 16, TokenBudget(text=96, image=960))
    alone = [index for index, length in enumerate(lengths) if not length.image_tokens]
    assert 0 < len(alone) < 16
    drawn = RandomSamples(fresh_model("casa"), lengths)
    assert "image_positions" not in drawn.packed(alone)
    assert len(drawn.padded(range(16))["image_positions"]) == 16 - len(alone)


def test_padding_doubles_the_work_at_least():
    """Of the bench's own samples: so many positions are computed padded, for each one packed."""
    for kind, budget in KINDS.items():
        lengths = drawn_lengths(kind, 64, budget)
        slots = text_slots(lengths, ways_of(lengths, budget))
        assert slots["packed"] == sum(length.text_tokens for length in lengths)
        assert slots["padded"] >= 2 * slots["packed"]


def test_slots_are_those_of_the_batches():
    lengths = drawn_lengths(PROPORTIONED, 6, TokenBudget(text=96, image=96))
    ways, drawn = ways_of(lengths, TokenBudget(text=96, image=96)), RandomSamples(fresh_model("casa"), lengths)
    for way, slots in text_slots(lengths, ways).items():
        assert slots == sum(getattr(drawn, way)(chosen)["input_ids"].numel() for chosen in ways[way])


def test_every_sample_is_in_one_pack_and_one_batch():
    lengths = [SampleLength(5, 9), SampleLength(5, 9), SampleLength(2, 1), SampleLength(10, 10)]
    ways = ways_of(lengths, TokenBudget(text=10, image=20))
    assert sorted(index for pack in ways["packed"] for index in pack) == [0, 1, 2, 3]
    rows = round(4 / len(ways["packed"]))
    assert ways["padded"] == [[0, 1, 2, 3][at : at + rows] for at in range(0, 4, rows)]


def test_every_kind_of_samples_is_packed():
    found = packing(samples=400)
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
    [{"methods": ("other",)}, {"image_tokens": (18,)}, {"text_tokens": 4}, {"samples": 0}, {"parts": ("other",)}],
)
def test_cases_that_cannot_be_are_refused(choice):
    with pytest.raises(UserError):
        TrainSettings(**choice)
    with pytest.raises(UserError, match="two or more"):
        bench_train(TrainSettings(("memory",), image_tokens=(16, 16), device="cpu"))
