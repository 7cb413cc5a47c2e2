"""Which weights are gathered together: what the image keys and values need from the first is left to the root."""

import pytest
import torch
from torch import nn

from casa.errors import UserError
from casa.testing import tiny_casa, tiny_casa_over
from casa.training.fsdp import shard_model, sharded_groups


def grouped(model):
    """Names of the parameters in groups, each group's by itself, and of those of the root."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.pop(id(p)) for part in group for p in part.parameters()] for group in sharded_groups(model)]
    return groups, set(names.values())


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3_vl"])
def test_the_root_keeps_what_is_read_ahead(family):
    model = tiny_casa() if family == "llama" else tiny_casa_over(family)
    # no parameter is in two groups: it would be missing from the names the second time
    groups, root = grouped(model)
    blocks = len(model.decoder.blocks)
    assert sum(any(".mlp." in name and "layers" in name for name in group) for group in groups) >= blocks
    for name in root:
        assert not name.endswith(("self_attn.q_proj.weight", "mlp.down_proj.weight"))
    for index in model.fused_blocks:
        for part in ("k_proj", "v_proj"):
            assert f"casa_layers.{index}.{part}.weight" in root
        norm = model.decoder.image_norm(index).gain
        assert any(parameter is norm for name, parameter in model.named_parameters() if name in root)
    assert [f"casa_layers.{model.fused_blocks[0]}.q_proj.weight" in group for group in groups].count(True) == 1


def test_a_borrowed_attention_is_read_ahead_too():
    groups, root = grouped(tiny_casa(share_weights=True))
    assert "backbone.model.layers.0.self_attn.k_proj.weight" in root
    assert any("backbone.model.layers.0.mlp.up_proj.weight" in group for group in groups)


def test_blocks_without_a_layer_are_whole():
    groups, root = grouped(tiny_casa(layers=(1,)))
    assert any("backbone.model.layers.0.input_layernorm.weight" in group for group in groups)
    assert "backbone.model.layers.1.input_layernorm.weight" in root
    groups, root = grouped(tiny_casa(method="insertion"))
    assert not any(".layers." in name for name in root)


def test_what_cannot_be_spread_is_refused():
    with pytest.raises(UserError, match="update_images"):
        sharded_groups(tiny_casa(update_images=True))
    with pytest.raises(UserError, match="torchrun"):
        shard_model(tiny_casa(), torch.device("cpu"))
    with pytest.raises(UserError, match="LoRA"):
        shard_model(nn.Linear(2, 2), torch.device("cpu"))
