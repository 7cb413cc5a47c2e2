"""Weights in 8 bits: what they mean, what is left of the answers, and what such a model refuses."""

import pytest
import torch
from torch import nn

from casa.errors import UserError
from casa.models.int8 import Int8Linear, is_int8, to_int8
from casa.testing import TinySample, as_batch, tiny_casa, tiny_casa_over
from tests.models.test_decoding import NEXT, PROMPT, ROWS, decoded, ways, why  # noqa: F401


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_its_rounded_weights(rows, dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8
    whole = layer.weight.double() * layer.scale.double()[:, None]
    step = linear.weight.detach().double().abs().amax(1, keepdim=True) / 127
    assert ((whole - linear.weight.detach().double()).abs() <= 0.5 * step + 0.01 * step * 127).all()
    x = torch.randn(2, rows, 48).to(dtype)
    wanted = x.double() @ whole.t() + (0 if linear.bias is None else linear.bias.detach().double())
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(layer(x).double(), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "helium", "gemma3_text", "smolvlm"])
def test_tokens_are_decoded_on_them_as_through_the_modules(kind, ways):  # noqa: F811
    model = to_int8(tiny_casa_over(kind))
    sample = PROMPT.in_squares() if kind == "smolvlm" else PROMPT
    found, _ = decoded(model, sample.inputs())
    assert bool(ways) == (kind != "gemma3_text")
    ways.clear()
    torch.testing.assert_close(found, decoded(model, sample.inputs(), grad=True)[0], rtol=1e-10, atol=1e-10)
    assert not ways


def test_answers_stay_near_and_rows_are_those_alone():
    whole, _ = decoded(tiny_casa(), as_batch(ROWS))
    model = to_int8(tiny_casa())
    found, _ = decoded(model, as_batch(ROWS))
    assert 0 < (found - whole).abs().max() < 0.2 * whole.std()
    for row, sample in enumerate(ROWS):
        alone, _ = decoded(model, sample.inputs(), [ids[row:] for ids in NEXT])
        torch.testing.assert_close(found[row], alone[0], rtol=1e-9, atol=1e-9)


def test_what_is_left_whole():
    model = to_int8(tiny_casa())
    assert is_int8(model)
    assert not any(isinstance(module, Int8Linear) for module in (*model.vision.modules(), *model.projector.modules()))
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert why(model) is None


def test_it_is_not_saved_and_not_made_of_what_is_more_than_weights(tmp_path):
    with pytest.raises(UserError, match="int8"):
        to_int8(tiny_casa()).save_pretrained(tmp_path)
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_casa()
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model)
    with pytest.raises(UserError, match="merge its adapter"):
        to_int8(model)


def test_a_frame_is_projected_by_int8_layers():
    model = to_int8(tiny_casa())
    with torch.no_grad():
        assert model(**TinySample((5, 6), ((0, 2, 2),)).inputs()).logits.isfinite().all()
