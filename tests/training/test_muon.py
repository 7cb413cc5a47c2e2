"""Muon in the trainer: its matrices, its steps and its state. Runs that go on with it are in test_resume.py."""

import pytest
import torch
from torch import nn

from casa.errors import UserError
from casa.testing import tiny_casa
from casa.training.config import OptimisationSettings, TrainerSettings
from casa.training.optimizer import MOMENTUM, MuonAdamW, orthogonalise, parameter_groups


def groups_of(**choice):
    model = tiny_casa()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimisationSettings(steps=1, muon_lr=0.02, **choice))
    return {group["name"]: (group, [names[id(parameter)] for parameter in group["params"]]) for group in groups}


def test_it_gets_the_matrices_inside_blocks():
    groups = groups_of(lr_overrides={"^vision.*mlp": 0.5})
    group, names = groups["muon"]
    assert (group["lr"], group["muon"], group["weight_decay"]) == (0.02, True, 0.05)
    assert all(parameter.ndim == 2 for parameter in group["params"])
    for name in ("backbone.model.layers.0.mlp.up_proj.weight", "casa_layers.2.k_proj.weight"):
        assert name in names
    # what `rates` names goes by that rate, and by AdamW
    assert not any("vision" in name and "mlp" in name for name in names)
    assert dict(zip(names, group["parts"], strict=True))["vision.blocks.1.attn.qkv.weight"] == 3
    assert sum(group["parts"]) == len(names) + 2 * 2
    others = {name for label, (_, found) in groups.items() if label != "muon" for name in found}
    for name in ("backbone.model.embed_tokens.weight", "backbone.lm_head.weight", "projector.up.weight"):
        assert name in others
    assert not any("muon" in groups[label][0] for label in groups if label != "muon")


def test_a_rate_that_reaches_nothing_is_refused():
    every = {"layers|blocks": 1e-3}
    with pytest.raises(UserError, match=r"muon_lr is 0\.02, but no matrix inside a block is trained by it"):
        parameter_groups(tiny_casa(), OptimisationSettings(steps=1, muon_lr=0.02, lr_overrides=every))


def test_a_compressors_blocks_are_blocks():
    names = {}
    model = tiny_casa(compressor="q_former:3")
    for group in parameter_groups(model, OptimisationSettings(steps=1, muon_lr=0.02)):
        names |= {id(parameter): group["name"] for parameter in group["params"]}
    found = {name: names[id(parameter)] for name, parameter in model.named_parameters() if "compressor" in name}
    assert {label for name, label in found.items() if name.endswith("key_value.weight")} == {"muon"}


def test_without_a_rate_there_is_none():
    assert "muon" not in {group["name"] for group in parameter_groups(tiny_casa(), OptimisationSettings(steps=1))}


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.qkv = nn.Linear(5, 12)
        self.out = nn.Linear(12, 5, bias=False)

    def forward(self, seen):
        return self.out(self.qkv(seen).tanh())


def learn(net, step, steps):
    for number in steps:
        seen = torch.randn(16, 5, generator=torch.Generator().manual_seed(number))
        (net(seen) - seen.flip(1)).square().mean().backward()
        step(number)
        net.zero_grad()


def optimiser_of(net):
    matrices = {"params": [net.qkv.weight, net.out.weight], "lr": 0.02, "weight_decay": 0.05}
    rest = {"params": [net.qkv.bias], "lr": 0.01, "weight_decay": 0.0}
    return MuonAdamW([matrices | {"muon": True, "parts": [3, 1]}, rest], betas=(0.9, 0.98), fused=True)


def test_its_steps_are_those_of_each_matrix_by_itself_and_of_adamw():
    one, other = SmallNet(), SmallNet()
    found = optimiser_of(one)
    learn(one, lambda _: found.step(), range(6))
    adamw = torch.optim.AdamW([other.qkv.bias], lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    # `qkv` is three matrices, one above the other
    momenta = [torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(5, 12)]

    @torch.no_grad()
    def step(_):
        adamw.step()
        matrices = [*zip(other.qkv.weight.chunk(3), other.qkv.weight.grad.chunk(3), strict=True)]
        matrices.append((other.out.weight, other.out.weight.grad))
        for (matrix, gradient), momentum in zip(matrices, momenta, strict=True):
            momentum.mul_(MOMENTUM).add_(gradient)
            direction = orthogonalise((gradient + MOMENTUM * momentum)[None])[0]
            matrix.mul_(1 - 0.02 * 0.05).sub_(direction * 0.02 * 0.2 * max(matrix.shape) ** 0.5)

    learn(other, step, range(6))
    for (name, parameter), same in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, msg=name)
    assert not torch.equal(one.out.weight, SmallNet().out.weight)


def test_its_state_is_saved_and_loaded():
    whole, first = SmallNet(), SmallNet()
    found = optimiser_of(whole)
    learn(whole, lambda _: found.step(), range(6))
    begun = optimiser_of(first)
    learn(first, lambda _: begun.step(), range(3))
    second = SmallNet()
    second.load_state_dict(first.state_dict())
    resumed = optimiser_of(second)
    resumed.load_state_dict(begun.state_dict())
    learn(second, lambda _: resumed.step(), range(3, 6))
    for parameter, same in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_a_parameter_without_a_gradient_stays():
    net = SmallNet()
    found = optimiser_of(net)
    before = net.out.weight.detach().clone()
    net.qkv(torch.ones(1, 5)).sum().backward()
    found.step()
    assert torch.equal(net.out.weight, before)
    assert net.out.weight not in found.state


def test_spread_weights_are_refused():
    chosen = OptimisationSettings(steps=1, muon_lr=0.01)
    with pytest.raises(UserError, match=r"optimisation\.muon_lr is 0\.01; it must be 0 with sharding: fsdp"):
        TrainerSettings(optimisation=chosen, sharding="fsdp")
    with pytest.raises(UserError, match=r"muon_lr is -1\.0; it must be 0 or more"):
        OptimisationSettings(steps=1, muon_lr=-1.0)
