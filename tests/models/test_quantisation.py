"""8 and 4 bit weights through transformers' own configs, with bitsandbytes, which runs on a CPU."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from casa import CasaConfig, CasaForConditionalGeneration, FusionConfig, adapt
from casa.errors import UserError
from casa.layers import project_images
from casa.testing import TinySample, tiny_backbone, tiny_casa, tiny_encoder, tiny_text_model
from casa.testing.tiny import spread

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
WAYS = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
# mean difference of logits over their mean size, for tiny weights: at most 0.033 and 0.39 were measured
WORST = {"8 bit": 0.1, "4 bit": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast from:UserWarning")


def inputs():
    return {k: v.float() if v.is_floating_point() else v for k, v in SAMPLE.inputs().items()}


@torch.no_grad()
def logits(model):
    return model(**inputs()).logits


def saved(folder, **fusion):
    """As wide as a block of 64 numbers, but for the projector, which is 18 wider, and half of the tower."""
    text = tiny_text_model(0, torch.float32, hidden_size=64, intermediate_size=128)
    tower = tiny_encoder(1, torch.float32, hidden_size=64, intermediate_size=40, out_hidden_size=64)
    model = adapt(text, FusionConfig(**fusion), vision=tower).eval()
    torch.manual_seed(2)
    spread(model.projector)
    model.save_pretrained(folder)
    return model


def loaded(folder, way, **more):
    settings = BitsAndBytesConfig(**WAYS[way], **more)
    return CasaForConditionalGeneration.from_pretrained(folder, quantization_config=settings).eval()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "fusion", [{}, {"placement": "replace", "every": 2}, {"method": "insertion"}, {"update_images": True}], ids=str
)
def test_it_says_nearly_the_same(tmp_path, way, fusion):
    model = saved(tmp_path, **fusion)
    small = loaded(tmp_path, way)
    kind = bitsandbytes.nn.Linear8bitLt if way == "8 bit" else bitsandbytes.nn.Linear4bit
    quantised = [name for name, module in small.named_modules() if isinstance(module, kind)]
    assert any("mlp" in name for name in quantised)
    if not model.fusion.borrows and model.fusion.method == "casa":
        assert {"casa_layers.0.k_proj", "casa_layers.2.v_proj"} <= set(quantised)
    found, wanted = logits(small), logits(model)
    away = float((found - wanted).abs().mean() / wanted.abs().mean())
    assert 0 < away < WORST[way]
    tokens = small.generate(**inputs(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, 11)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_saved_small_is_loaded_small(tmp_path, way):
    saved(tmp_path / "full")
    small = loaded(tmp_path / "full", way)
    small.save_pretrained(tmp_path / "small")
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("full", "small")]
    assert sizes[1] < 0.8 * sizes[0]
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again), logits(small))


@torch.no_grad()
def test_matrices_that_blocks_of_64_do_not_fit_are_left_as_they_are(tmp_path):
    """bitsandbytes reads such ones back wrong on some CPUs, and fails over others."""
    model = saved(tmp_path)
    small = loaded(tmp_path, "4 bit")
    full = {name for name, module in small.named_modules() if type(module) is torch.nn.Linear}
    assert {"projector.up", "vision.blocks.0.mlp.down_proj", "vision.blocks.1.mlp.up_proj"} <= full
    for name, module in small.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            read = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).float()
            wanted = model.get_submodule(name).weight
            assert float((read - wanted).norm() / wanted.norm()) < 0.12, name
    own = loaded(tmp_path, "4 bit", llm_int8_skip_modules=["casa_layers"])
    assert {type(own.projector.up), type(own.casa_layers["0"].k_proj)} == {torch.nn.Linear}
    assert isinstance(own.backbone.lm_head, bitsandbytes.nn.Linear4bit) == (own.backbone.lm_head.out_features % 32 == 0)


@pytest.mark.parametrize("given", ["values", "config", "Auto class"])
def test_however_it_is_loaded(tmp_path, given):
    saved(tmp_path)
    settings = BitsAndBytesConfig(**WAYS["4 bit"])
    config = CasaConfig.from_pretrained(tmp_path)
    kind = AutoModelForImageTextToText if given == "Auto class" else CasaForConditionalGeneration
    more = {"config": config} if given == "config" else {}
    before = config.to_dict(), settings.to_dict()
    quantised = settings.to_dict() if given == "values" else settings
    small = kind.from_pretrained(tmp_path, quantization_config=quantised, **more)
    assert type(small.projector.up) is torch.nn.Linear
    assert isinstance(small.backbone.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert (config.to_dict(), settings.to_dict()) == before


def test_a_vlm_in_4_bits(tmp_path):
    """Its tower's MLPs are 12 x 24 here, in Qwen2.5-VL-3B 3,420 wide: neither is a number of whole blocks."""
    adapt(tiny_backbone("qwen2_5_vl").float(), FusionConfig()).save_pretrained(tmp_path)
    small = loaded(tmp_path, "4 bit")
    wide = [module for module in small.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert all(module.in_features % 64 == 0 for module in wide)
    assert logits(small).isfinite().all()


@torch.no_grad()
def test_image_keys_come_from_the_quantised_projections(tmp_path):
    """Not from their packed bytes: what a layer projects is its block's norm, then its own k_proj and v_proj."""
    saved(tmp_path)
    small = loaded(tmp_path, "4 bit")
    image = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layers = list(small.casa_layers.values())
    pairs = project_images(image, layers, [small.decoder.image_norm(index) for index in range(3)])
    for block, layer, (key, value) in zip(small.decoder.blocks, layers, pairs, strict=True):
        normed = block.input_layernorm(image)
        torch.testing.assert_close(key.flatten(1), layer.k_proj(normed), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value.flatten(1), layer.v_proj(normed), rtol=1e-5, atol=1e-5)
    none = project_images(image[:0], layers, [small.decoder.image_norm(index) for index in range(3)])
    assert [key.shape for key, _ in none] == [(0, 2, 16)] * 3


def test_fusion_can_be_trained_in_full_over_a_small_backbone(tmp_path):
    """Skipped modules stay as they are: a frozen 4 bit language model with CASA layers in float32."""
    saved(tmp_path)
    small = loaded(tmp_path, "4 bit", llm_int8_skip_modules=["casa_layers", "projector", "vision", "lm_head"])
    assert type(small.casa_layers["0"].k_proj) is torch.nn.Linear
    assert isinstance(small.backbone.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    small.requires_grad_(False)
    small.casa_layers.requires_grad_(True)
    small.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in small.casa_layers.parameters())


def test_a_quantised_backbone_is_not_adapted(tmp_path):
    tiny_text_model(dtype=torch.float32).save_pretrained(tmp_path)
    backbone = type(tiny_text_model()).from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(UserError, match=r"this backbone is quantised.*adapt it as it was before"):
        adapt(backbone, FusionConfig(), vision=tiny_encoder(dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_backbone_that_was_made_plain_again_is(tmp_path, way):
    tiny_text_model(dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "text")
    kind, settings = type(tiny_text_model()), BitsAndBytesConfig(**WAYS[way])
    backbone = kind.from_pretrained(tmp_path / "text", quantization_config=settings).dequantize()
    model = adapt(backbone, FusionConfig(), vision=tiny_encoder(dtype=torch.float32))
    model.save_pretrained(tmp_path / "casa")
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa")
    assert torch.equal(logits(loaded), logits(model))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_bnb_4bit

    saved(tmp_path)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"cannot be loaded: .*bitsandbytes"):
        loaded(tmp_path, "4 bit")


def test_copies_of_full_models_still_take_weights():
    model = tiny_casa()
    layer, attention = model.casa_layers["0"], model.decoder.attention(1)
    copy.deepcopy(layer).copy_from(attention)
    layer.copy_from(attention, silent=True)
    assert torch.equal(layer.k_proj.weight, attention.k_proj.weight)
    assert not layer.o_proj.weight.any()
