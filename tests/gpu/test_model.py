"""The model's promises on the GPU in bfloat16, with tolerances relative to what bfloat16 itself costs."""

from copy import deepcopy

import pytest
import torch

from casa.models import replay
from casa.testing import TinySample, as_batch, as_packed, tiny_casa

FUSIONS = {
    "parallel": {},
    "before": {"placement": "before"},
    "replace, whole samples": {"placement": "replace", "every": 2, "split": "sample"},
    "history 1": {"history": 1},
    "history all": {"history": -1},
    "cross": {"method": "cross_attention"},
    "cross, gated": {"method": "cross_attention", "gate": "tanh"},
}
SAMPLES = (
    TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=10),
    TinySample((7, 30, 11, 12), (), seed=20),
    TinySample((40, 6, 13, 22, 50), ((0, 2, 2), (0, 1, 1), (3, 3, 1)), seed=30),
)


@pytest.fixture(scope="module", params=FUSIONS)
def models(request, device):
    """In bfloat16 on the device, and the same rounded weights in float64 on the CPU."""
    model = tiny_casa(dtype=torch.bfloat16, **FUSIONS[request.param])
    return deepcopy(model).double(), model.to(device)


def moved(inputs, model):
    found = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            # pixels are rounded once, so that both precisions see the same picture
            value = value.bfloat16().to(model.dtype) if value.is_floating_point() else value
            value = value.to(model.device)
        found[name] = value
    return found


def logits(model, inputs, **more):
    return model(**moved(inputs, model), **more).logits


def alone(model):
    return torch.cat([logits(model, sample.inputs())[0] for sample in SAMPLES])


def check(no_worse, fast, plain, truth):
    no_worse(fast.cpu(), plain.cpu(), truth.cpu(), "logits")


@torch.no_grad()
def test_packed_is_each_sample_alone(models, no_worse):
    exact, model = models
    check(no_worse, logits(model, as_packed(SAMPLES))[0], alone(model), alone(exact))


@torch.no_grad()
def test_a_padded_batch_is_each_sample_alone(models, no_worse):
    exact, model = models
    rows = logits(model, as_batch(SAMPLES))
    found = torch.cat([row[-len(sample.ids) :] for row, sample in zip(rows, SAMPLES, strict=True)])
    check(no_worse, found, alone(model), alone(exact))


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True])
def test_pieces_are_one_pass(models, no_worse, late):
    exact, model = models
    for sample in SAMPLES:
        for cuts in ([2], [5 % len(sample.ids)], list(range(1, len(sample.ids)))):
            cache, parts = None, []
            for call in sample.calls([cut for cut in cuts if cut], late=late):
                output = model(**moved(call, model), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            check(no_worse, torch.cat(parts, dim=1), logits(model, sample.inputs()), logits(exact, sample.inputs()))


def test_packed_gradients_are_the_sum_of_each_sample_alone(models):
    exact, model = models
    weights = torch.randn(sum(len(s.ids) for s in SAMPLES), 61, generator=torch.Generator().manual_seed(5))

    def gradients(of, run):
        of.zero_grad()
        (run(of) * weights.to(of.device, of.dtype)).sum().backward()
        found = {name: p.grad.double().cpu() for name, p in of.named_parameters() if p.grad is not None}
        of.zero_grad()
        return found

    truth, plain = gradients(exact, alone), gradients(model, alone)
    fast = gradients(model, lambda of: logits(of, as_packed(SAMPLES))[0])
    assert set(fast) == set(plain) == set(truth)
    for name, want in truth.items():
        # bfloat16 keeps 8 bits, and a gradient is a sum of many such
        allowed = 2 * (plain[name] - want).norm() + 0.02 * want.norm()
        assert (fast[name] - want).norm() <= allowed, name


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_tokens_are_those_that_are_launched(models, no_worse, monkeypatch, rows):
    exact, model = models
    if model.device.type != "cuda":
        pytest.skip("only CUDA has graphs; tests/models/test_replay.py has a stand-in")
    captured, capture = [], replay.capture
    monkeypatch.setattr(replay, "capture", lambda run: captured.append(1) or capture(run))
    inputs = as_batch([SAMPLES[number % 3] for number in range(rows)])
    steps = torch.randint(3, 60, (40, rows, 1), generator=torch.Generator().manual_seed(7))

    def said(of):
        cache, mask = of(**moved(inputs, of), use_cache=True).past_key_values, inputs["attention_mask"]
        found = []
        for ids in steps:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            call = moved({"input_ids": ids, "attention_mask": mask}, of)
            found.append(of(**call, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1)

    found = said(model)
    assert bool(captured) == (model.fusion.history == 0 or model.fusion.attend == "image")
    with replay.launched():
        check(no_worse, found, said(model), said(exact))


@torch.no_grad()
def test_compiled_is_the_plain_pass(device, no_worse):
    """Each with its own roundings of bfloat16; two shapes, so that torch also tries sizes that vary."""
    model = tiny_casa(dtype=torch.bfloat16)
    exact, model = deepcopy(model).double(), model.to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    for sample in (SAMPLES[0], SAMPLES[2]):
        inputs = sample.inputs()
        found = logits(compiled, inputs, use_cache=False)
        check(no_worse, found, logits(model, inputs, use_cache=False), logits(exact, inputs))
    torch._dynamo.reset()
