"""All layers' image keys and values from one product are those of each block's norm and projections."""

import pytest
import torch
from torch import nn

from casa.layers import ImageNorm, project_images, rms_norm
from casa.testing import tiny_casa

WORST = 1e-12  # float64 rounding of a sum of products, with room


def image_tokens(count=7, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_folded_projection_is_each_blocks_norm_then_its_projections(group, shared):
    model, image = tiny_casa(share_weights=shared), image_tokens()
    blocks = model.backbone.model.layers
    sources = [block.self_attn for block in blocks] if shared else list(model.casa_layers.values())
    norms = [model.decoder.image_norm(index) for index in range(3)]
    found = project_images(image, sources, norms, group=group)
    for block, source, (key, value) in zip(blocks, sources, found, strict=True):
        normed = block.input_layernorm(image)
        assert key.shape == value.shape == (7, 2, 8)
        torch.testing.assert_close(key.flatten(1), source.k_proj(normed), rtol=0, atol=WORST)
        torch.testing.assert_close(value.flatten(1), source.v_proj(normed), rtol=0, atol=WORST)


def test_gradients_are_those_of_the_separate_projections():
    model, image = tiny_casa(), image_tokens().requires_grad_()
    blocks, sources = model.backbone.model.layers, list(model.casa_layers.values())
    weights = torch.randn(6, 7, 16, dtype=torch.float64)
    wanted_of = [image, *(s.k_proj.weight for s in sources), *(b.input_layernorm.weight for b in blocks)]

    def gradient(outputs):
        return torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), wanted_of)

    norms = [model.decoder.image_norm(index) for index in range(3)]
    joined = gradient([x.flatten(1) for pair in project_images(image, sources, norms) for x in pair])
    normed = [block.input_layernorm(image) for block in blocks]
    apart = gradient([p(n) for s, n in zip(sources, normed, strict=True) for p in (s.k_proj, s.v_proj)])
    for one, other in zip(joined, apart, strict=True):
        # the norm's own backward runs in float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Source(nn.Module):
    """Projections with a bias on the keys only, and a norm per head."""

    def __init__(self):
        super().__init__()
        self.head_dim = 4
        self.k_proj = nn.Linear(6, 8, dtype=torch.float64)
        self.v_proj = nn.Linear(6, 8, bias=False, dtype=torch.float64)
        self.k_norm = nn.RMSNorm(4, dtype=torch.float64)


def test_biases_and_head_norms_come_along():
    image = image_tokens(5, 6)
    source, gain = Source(), torch.rand(6, dtype=torch.float64)
    key, value = project_images(image, [source], [ImageNorm(gain, 1e-6)])[0]
    normed = rms_norm(image, 1e-6) * gain
    torch.testing.assert_close(key, source.k_norm(source.k_proj(normed).unflatten(-1, (2, 4))), rtol=0, atol=WORST)
    torch.testing.assert_close(value.flatten(1), source.v_proj(normed), rtol=0, atol=WORST)


def test_no_image_gives_empty_keys_and_no_layer_nothing():
    source, gain = Source(), torch.ones(6, dtype=torch.float64)
    key, value = project_images(torch.zeros(0, 6, dtype=torch.float64), [source], [ImageNorm(gain, 1e-6)])[0]
    assert key.shape == value.shape == (0, 2, 4)
    assert project_images(image_tokens(3, 6), [], []) == []


def test_layers_of_different_epsilon_or_images_are_projected_apart():
    norms = [ImageNorm(torch.ones(6, dtype=torch.float64), eps) for eps in (1e-5, 1e-2, 1e-2)]
    sources = [Source() for _ in norms]
    one, other = image_tokens(3, 6), image_tokens(3, 6) + 1.0
    found = project_images([one, one, other], sources, norms)
    for image, source, norm, pair in zip((one, one, other), sources, norms, found, strict=True):
        wanted = project_images(image, [source], [norm])[0]
        for mine, alone in zip(pair, wanted, strict=True):
            torch.testing.assert_close(mine, alone, rtol=0, atol=WORST)


class Tripled(nn.Linear):
    """A projection that does more than its weight says."""

    def forward(self, input):
        return 3 * super().forward(input)


@pytest.mark.parametrize("which", ["k_proj", "v_proj"])
@pytest.mark.parametrize("how", ["class", "parametrised", "hook", "forward"])
def test_a_projection_that_is_more_than_its_weight_is_called(which, how):
    model, image = tiny_casa(), image_tokens()
    sources, blocks = list(model.casa_layers.values()), model.backbone.model.layers
    linear = getattr(sources[1], which)
    if how == "class":
        linear.__class__ = Tripled
    elif how == "parametrised":
        nn.utils.parametrizations.spectral_norm(linear)
    elif how == "hook":
        linear.register_forward_hook(lambda module, given, output: 3 * output)
    else:
        plain = linear.forward
        linear.forward = lambda x: 3 * plain(x)
    model.eval()
    found = project_images(image, sources, [model.decoder.image_norm(index) for index in range(3)], group=2)
    for block, source, (key, value) in zip(blocks, sources, found, strict=True):
        normed = block.input_layernorm(image)
        torch.testing.assert_close(key.flatten(1), source.k_proj(normed), rtol=0, atol=WORST)
        torch.testing.assert_close(value.flatten(1), source.v_proj(normed), rtol=0, atol=WORST)
    none = project_images(image[:0], sources, [model.decoder.image_norm(index) for index in range(3)])
    assert [(key.shape, value.shape) for key, value in none] == [((0, 2, 8), (0, 2, 8))] * 3
