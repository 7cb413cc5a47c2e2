"""Packed training is one sample at a time: the loss and the gradient of every parameter, in float64."""

import pytest
import torch
from transformers.models.helium.modeling_helium import HeliumRMSNorm

from casa.testing import tiny_casa, tiny_casa_over, tiny_processor
from casa.training.collator import PackCollator
from casa.training.config import TokenBudget
from casa.training.samples import SampleMaker

MODELS = {
    "parallel": lambda: tiny_casa(),
    "before": lambda: tiny_casa(placement="before"),
    "replace": lambda: tiny_casa(placement="replace", every=2),
    "cross attention": lambda: tiny_casa(method="cross_attention"),
    "gated cross attention": lambda: tiny_casa(method="cross_attention", gate="tanh", placement="before"),
    "insertion": lambda: tiny_casa(method="insertion"),
    "history": lambda: tiny_casa(history=1),
    "sample windows": lambda: tiny_casa(split="sample"),
    "qwen2_5_vl": lambda: tiny_casa_over("qwen2_5_vl"),
    "qwen2_5_vl insertion": lambda: tiny_casa_over("qwen2_5_vl", method="insertion"),
    "qwen3": lambda: tiny_casa_over("qwen3"),
    "helium": lambda: tiny_casa_over("helium"),
}


def gradients(model, batches, count):
    """Gradients of the token-weighted mean over batches, and that mean."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        batch = batch | ({"pixel_values": batch["pixel_values"].double()} if "pixel_values" in batch else {})
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += float(loss.detach())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, total


@pytest.fixture
def samples(chat, picture):
    maker = SampleMaker(tiny_processor(), TokenBudget(500, 500))
    records = [
        chat(
            ("user", picture(84, 56), "ab"), ("assistant", "cde"), ("user", "f", picture(28, 28, 1)), ("assistant", "g")
        ),
        chat(("user", "no picture"), ("assistant", "at all 123")),
        chat(("user", picture(28, 56, 2), picture(56, 56, 3), "h"), ("assistant", "i")),
    ]
    return [sample for record in records for sample in maker(record)]


def whole_norm(self, hidden_states):
    """Helium's norm without its detour through float32, which would hide everything below 1e-7."""
    spread = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(spread + self.variance_epsilon)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_packed_training_is_one_sample_at_a_time(name, samples, monkeypatch):
    monkeypatch.setattr(HeliumRMSNorm, "forward", whole_norm)
    model = MODELS[name]().train().requires_grad_(True)
    model.loss_chunk = 5
    collate = PackCollator(tiny_processor())
    count = sum(sample.learned for sample in samples)
    packed, packed_loss = gradients(model, [collate(samples)], count)
    alone, loss = gradients(model, [collate([sample]) for sample in samples], count)
    split, split_loss = gradients(model, [collate(samples[:1]), collate(samples[1:])], count)
    assert packed_loss == pytest.approx(loss, rel=1e-12)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    # every parameter takes part: the tower's, the projector's, all
    assert set(packed) == {n for n, _ in model.named_parameters()}
    for other in (alone, split):
        for parameter, gradient in packed.items():
            scale = float(gradient.abs().max())
            assert scale > 0, parameter
            worst = float((gradient - other[parameter]).abs().max())
            assert worst <= 1e-9 * scale, f"{parameter}: {worst / scale:.1e}"


def test_a_sample_in_a_pack_learns_nothing_from_its_neighbours(samples):
    """The check above can fail: with positions that do not restart, the samples see each other."""
    model = tiny_casa().train().requires_grad_(True)
    model.loss_chunk = 100
    collate = PackCollator(tiny_processor())
    count = sum(sample.learned for sample in samples)
    batch = collate(samples)
    right, _ = gradients(model, [batch], count)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    wrong, _ = gradients(model, [batch], count)
    name = "backbone.model.layers.0.self_attn.q_proj.weight"
    assert float((right[name] - wrong[name]).abs().max()) > 1e-3 * float(right[name].abs().max())
