"""CasaAttention: made from a self-attention, and equal to what insertion's first block gives text."""

import pytest
import torch
from torch import nn

from casa.layers import CasaAttention, PackedStep, plan_call, project_images
from casa.testing import TinySample, tiny_casa
from casa.windows import WindowLayout

IMAGE, TEXT, WIDTH = 6, 5, 32


def insertion_attention(model, image, text):
    """What the first block's own self-attention gives [image; text] in one causal stream, at text positions."""
    block = model.backbone.model.layers[0]
    stream = block.input_layernorm(torch.cat([image, text]))[None]
    positions = torch.arange(IMAGE + TEXT)[None]
    factors = model.backbone.model.rotary_emb(stream, positions)
    out, _ = block.self_attn(stream, position_embeddings=factors, attention_mask=None)
    return out[0, IMAGE:]


def step_where_images_take_positions(model, image, rotary):
    """A step over one window, image in front; text stands behind the image's positions, as under insertion."""
    layer, norm = model.casa_layers["0"], model.decoder.image_norm(0)
    plan = plan_call(torch.ones(1, TEXT, dtype=torch.bool), [(0, 0)], [IMAGE])
    key, value = project_images(image, [layer], [norm])[0]
    turned = rotary(torch.arange(IMAGE))(key)

    def behind_the_image(positions):
        # asked for the image's one position (0, for IMAGE tokens) it leaves the keys as they are
        if len(positions) == IMAGE:
            return rotary(torch.zeros_like(positions))
        return rotary(positions + IMAGE)

    return PackedStep(plan, [(turned, value)], [behind_the_image])


@torch.no_grad()
def test_block_0_gives_text_what_insertions_block_0_gives_it():
    model = tiny_casa()
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(IMAGE, WIDTH, generator=generator, dtype=torch.float64)
    text = torch.randn(TEXT, WIDTH, generator=generator, dtype=torch.float64)
    rotary = model.decoder.rotaries([0], torch.device("cpu"), torch.float64)[0]
    step = step_where_images_take_positions(model, image, rotary)
    hidden = model.backbone.model.layers[0].input_layernorm(text)[None]
    found = model.casa_layers["0"](hidden, step, 0)[0]
    torch.testing.assert_close(found, insertion_attention(model, image, text), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", [None, "tanh"])
def test_text_that_sees_no_image_is_left_alone_whatever_its_numbers_come_to(gate):
    """Two tokens before the image, whose update overflows: zero, and nothing of it in the gradients."""
    torch.manual_seed(0)
    layer = CasaAttention(Attention().float(), gate)
    with torch.no_grad():
        layer.o_proj.weight *= 1e20
    plan = plan_call(torch.ones(1, 5, dtype=torch.bool), [(0, 2)], [3])
    image = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    hidden = torch.randn(1, 5, 8)

    def run(blind):
        layer.zero_grad()
        given = hidden.clone()
        given[:, :2] *= blind
        given.requires_grad_(True)
        update = layer(given, PackedStep(plan, [image], [None]), 0)
        (update * 1e-20).sum().backward()
        return [update.detach(), given.grad[:, 2:], *(p.grad.clone() for p in layer.parameters())]

    for found, wanted in zip(run(1e20), run(1.0), strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(found, wanted)
    assert not run(1e20)[0][:, :2].any()


class Attention(nn.Module):
    def __init__(self, bias=False, norm=False):
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.o_proj = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=False)
        self.k_proj, self.v_proj = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)
        if norm:
            self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (True, True)])
def test_everything_is_copied_and_nothing_shared(bias, norm):
    attention = Attention(bias, norm).to(torch.bfloat16)
    layer = CasaAttention(attention)
    assert layer.state_dict().keys() == attention.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, attention.state_dict()[name])
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() != attention.state_dict()[name].data_ptr()
    with torch.no_grad():
        attention.q_proj.weight.add_(1)
    assert not torch.equal(layer.q_proj.weight, attention.q_proj.weight)
    layer.copy_from(attention)
    assert torch.equal(layer.q_proj.weight, attention.q_proj.weight)


def test_what_is_no_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no q_proj, k_proj, v_proj, o_proj, head_dim"):
        CasaAttention(nn.Linear(2, 2))


def test_a_gate_starts_closed():
    assert CasaAttention(Attention(), gate="tanh").gate.tolist() == [0.0]
    assert CasaAttention(Attention()).gate is None


@torch.no_grad()
def test_record_sees_what_the_layers_attend_with():
    model, met = tiny_casa(every=2), []
    sample = TinySample((5, 9, 17, 4), ((1, 2, 2),))
    model(**sample.inputs(), record=lambda *given: met.append(given))
    assert len(met) == 1
    layer, query, text_key, image_key, layout = met[0]
    assert layer == 0
    assert (query.shape, text_key.shape, image_key.shape) == ((4, 4, 8), (4, 2, 8), (4, 2, 8))
    assert layout == WindowLayout.from_insertions([4], [[(1, 4)]])
