"""The schedule's shape, Muon's directions, and a state that can be taken up again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from casa.training import muon
from casa.training.muon import Muon, muon_step, orthogonalise, parts_of
from casa.training.optimisation import Group, Optimiser, Schedule


@given(st.integers(1, 500), st.integers(0, 50), st.floats(0, 1))
def test_the_rate_is_positive_and_at_most_one(steps: int, warmup: int, decay: float) -> None:
    schedule = Schedule(steps, warmup, decay)
    factors = [schedule.factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_warm_up_constant_decay() -> None:
    schedule = Schedule(steps=100, warmup=10, decay=0.5)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(9) == 1
    assert schedule.factor(50) == 1
    assert schedule.factor(75) == pytest.approx(0.5)
    assert schedule.factor(99) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (16, 32)])
def test_all_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(5, *shape)))
    # the iteration trades exactness for speed: it is meant to land between about 0.7 and 1.2
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_a_stack_is_its_members() -> None:
    stack = torch.randn(3, 4, 6)
    together = orthogonalise(stack)
    for member, alone in zip(together, stack, strict=True):
        torch.testing.assert_close(member, orthogonalise(alone[None])[0])


def test_joined_projections_are_turned_one_by_one() -> None:
    torch.manual_seed(0)
    joined = nn.Parameter(torch.randn(12, 4))
    single = [nn.Parameter(part.clone()) for part in joined.data.chunk(3)]
    gradient = torch.randn(12, 4)
    joined.grad = gradient
    for part, own in zip(single, gradient.chunk(3), strict=True):
        part.grad = own
    Muon({"attn.qkv.weight": joined}, 0.1, 0.1).step(1.0)
    Muon({str(i): part for i, part in enumerate(single)}, 0.1, 0.1).step(1.0)
    torch.testing.assert_close(joined.data, torch.cat([part.data for part in single]))


def test_large_stacks_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(3, 5, 4) for _ in range(3)]
    found, sizes = [], []

    def counted(stack: torch.Tensor) -> torch.Tensor:
        sizes.append(len(stack))
        return orthogonalise(stack)

    monkeypatch.setattr(muon, "orthogonalise", counted)
    for most in (10**6, 2 * 5 * 4, 1):
        monkeypatch.setattr(muon, "STACK", most)
        matrices, gradients, momenta = (each.clone() for each in drawn)
        muon_step(zip(matrices, gradients, momenta, strict=True), 0.1, 0.1)
        found.append((matrices, momenta))
    assert sizes == [3, 2, 1, 1, 1, 1]
    for matrices, momenta in found[1:]:
        torch.testing.assert_close(matrices, found[0][0])
        assert torch.equal(momenta, found[0][1])


def test_a_matrix_that_the_step_did_not_reach_stays() -> None:
    torch.manual_seed(0)
    matrices, momenta = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    before = matrices.clone()
    gradients = torch.stack([torch.zeros(5, 4), torch.randn(5, 4)])
    muon_step(zip(matrices, gradients, momenta, strict=True), 0.1, 0.0)
    assert torch.equal(matrices[0], before[0])
    assert not torch.equal(matrices[1], before[1])


def test_joined_projections_are_known_by_name() -> None:
    names = ("blocks.0.attn.qkv.weight", "compressor.blocks.0.cross.key_value.weight", "layers.0.mlp.up_proj.weight")
    assert [parts_of(name) for name in names] == [3, 2, 1]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def _optimiser(model: nn.Module) -> Optimiser:
    named = dict(model.named_parameters())
    matrix = {"0.weight": named.pop("0.weight")}
    return Optimiser([Group(0.01, named), Group(0.02, matrix, muon=True)], Schedule(20, 2, 0.5))


def _steps(model: nn.Module, optimiser: Optimiser, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        optimiser.step(step)
        losses.append(float(loss.detach()))
    return losses


def test_it_learns_and_can_be_taken_up_again() -> None:
    model = _model()
    losses = _steps(model, _optimiser(model), 0, 20)
    assert losses[-1] < losses[0]

    half = _model()
    first = _optimiser(half)
    _steps(half, first, 0, 10)
    other = _model()
    other.load_state_dict(half.state_dict())
    second = _optimiser(other)
    second.load_state(first.state())
    _steps(other, second, 10, 20)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


def test_only_what_is_named_is_trained() -> None:
    model = _model()
    before = model[2].weight.detach().clone()
    _steps(model, Optimiser([Group(0.1, {"0.weight": model[0].weight})], Schedule(5, 0, 0)), 0, 5)
    assert torch.equal(model[2].weight, before)


def test_the_norm_is_that_before_clipping() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimiser = Optimiser([Group(0.1, {"x": parameter})], Schedule(1, 0, 0), clip=1.0)
    parameter.grad = torch.tensor([3.0, 4.0, 0.0])
    assert optimiser.step(0) == pytest.approx(5.0)
    assert parameter.grad is None
