"""Muon's directions."""

import pytest
import torch

from casa.training import optimizer as muon
from casa.training.optimizer import muon_step, orthogonalise, parts_of


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
