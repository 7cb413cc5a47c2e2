"""Any image encoder beside a text-only model: the same promises with SigLIP and SigLIP2 as with Qwen's towers."""

import json

import pytest
import torch
from transformers import Siglip2VisionConfig, SiglipVisionConfig

from casa import CasaForConditionalGeneration, FusionConfig, adapt
from casa.errors import UserError
from casa.models import freeze_backbone
from casa.models.convert import convert
from casa.testing import TEXT_BACKBONES, VLM_BACKBONES, TinySample, tiny_backbone, tiny_encoder, tiny_text_model
from casa.testing.tiny import spread
from casa.vision import is_known, kind_of, load_encoder, new_encoder

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "patch_size": 14}
TOWERS = {
    "siglip": SiglipVisionConfig(**SMALL, image_size=56),
    "siglip2": Siglip2VisionConfig(**SMALL, num_patches=16),
}
IDS = torch.tensor([[5, 9, 17, 4, 33, 8, 21]])


PAIRS = [("siglip", "qwen3"), ("siglip", "gemma3_text"), *(("siglip2", kind) for kind in TEXT_BACKBONES)]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request):
    return request.param


@pytest.fixture(scope="module")
def tower(pair):
    torch.manual_seed(1)
    return pair[0], spread(new_encoder(TOWERS[pair[0]])).double()


@pytest.fixture(scope="module")
def model(pair, tower):
    model = adapt(tiny_backbone(pair[1]), FusionConfig(), vision=tower[1]).eval()
    torch.manual_seed(2)
    spread(model.projector)
    return model


def pictures(kind, count):
    """Pictures of 4 x 4 patches, as the tower takes them."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, 56, 56) if kind == "siglip" else (16 * count, 3 * 14 * 14)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


@torch.no_grad()
def test_text_looks_at_their_tokens(tower, model, close):
    inputs = pictures(tower[0], 2) | {"input_ids": IDS, "image_positions": torch.tensor([[0, 2], [0, 5]])}
    whole = model(**inputs).logits
    assert float((whole - model(input_ids=IDS).logits)[0, 2:].abs().min(-1).values.max()) > 0
    one = {k: v[: len(v) // 2] for k, v in pictures(tower[0], 2).items()}
    first = model(input_ids=IDS[:, :4], image_positions=torch.tensor([[0, 2]]), use_cache=True, **one)
    two = {k: v[len(v) // 2 :] for k, v in pictures(tower[0], 2).items()}
    second = model(
        input_ids=IDS[:, 4:], image_positions=torch.tensor([[0, 1]]), past_key_values=first.past_key_values, **two
    )
    close(torch.cat([first.logits, second.logits], dim=1), whole)


@pytest.mark.slow
@torch.no_grad()
def test_saved_is_loaded(tower, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_last_blocks_of_the_tower_can_be_trained(model):
    freeze_backbone(model, tower_blocks=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("vision.")}
    assert {name.split("layers.")[1][0] for name in trained} == {"3", "4"}
    model.requires_grad_(True)


def published(folder, name):
    """A VLM's folder as Qwen publishes it: the tower's config says the model_type of the whole."""
    tiny_backbone("qwen2_5_vl", dtype=torch.float32).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = name
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_a_tower_called_by_the_name_of_its_whole_model(tmp_path):
    """transformers 5.17 keeps that name, and then a file that says it would be read as the whole model's."""
    tower = tiny_encoder()
    tower.config.model_type = "qwen2_5_vl"
    assert is_known(tower.config)
    assert kind_of(tower.config) == "qwen2_5_vl_vision"
    model = adapt(tiny_text_model(), vision=tower).eval()
    model.save_pretrained(tmp_path / "one")
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "one", dtype=torch.float64).eval()
    inputs = TinySample((5, 9, 17), ((1, 2, 3),)).inputs()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_vision"])
def test_published_vlms_and_their_towers_are_taken(name, tmp_path):
    vlm = published(tmp_path / "vlm", name)
    inside = adapt(vlm).state_dict()
    convert(vlm, tmp_path / "casa", max_shard_size="40KB")
    found = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").state_dict()
    assert found.keys() == inside.keys()
    assert all(torch.equal(found[key], inside[key]) for key in inside)
    tiny_text_model(dtype=torch.float32).save_pretrained(tmp_path / "text")
    convert(tmp_path / "text", tmp_path / "both", vision=vlm)
    both = CasaForConditionalGeneration.from_pretrained(tmp_path / "both").state_dict()
    for key in (key for key in inside if ".visual." in key):
        assert torch.equal(both[key.replace("backbone.model.visual.", "vision.")], inside[key]), key


def deep_tower(blocks):
    config = tiny_encoder().config
    config.depth = blocks
    torch.manual_seed(1)
    return new_encoder(config)


@pytest.mark.parametrize("blocks", [6, 3])
@pytest.mark.parametrize("kind", VLM_BACKBONES)
def test_a_vlm_comes_frozen_but_for_fusion_and_the_last_four_blocks_of_its_tower(kind, blocks):
    backbone = tiny_backbone(kind)
    qwen = kind.startswith("qwen")
    setattr(backbone.config.vision_config, "depth" if qwen else "num_hidden_layers", blocks)
    model = adapt(type(backbone)(backbone.config), FusionConfig(compressor="q_former:2", gist=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tower = "backbone.model.visual.blocks." if qwen else "backbone.model.vision_model.encoder.layers."
    last = tuple(f"{tower}{index}." for index in range(max(0, blocks - 4), blocks))
    wanted = {
        name for name, _ in model.named_parameters() if name.startswith((*last, "casa_layers.", "compressor.", "gist."))
    }
    assert trained == wanted
    assert len({name.removeprefix(tower).split(".")[0] for name in trained if name.startswith(tower)}) == min(blocks, 4)


def test_of_a_text_model_everything_is_trained_until_frozen():
    model = adapt(tiny_text_model(), vision=deep_tower(6).double())
    assert all(p.requires_grad for p in model.parameters())
    freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained if name.startswith("vision.")} == {"2", "3", "4", "5"}
    assert {name.split(".")[0] for name in trained} == {"vision", "projector", "casa_layers"}


def test_settings_of_generation_come_along(tmp_path):
    backbone = tiny_backbone("qwen2_5_vl", dtype=torch.float32)
    settings = {"do_sample": True, "temperature": 0.3, "top_k": 7, "repetition_penalty": 1.05, "eos_token_id": [2, 6]}
    backbone.generation_config.update(**settings)
    backbone.save_pretrained(tmp_path / "vlm")
    convert(tmp_path / "vlm", tmp_path / "converted")
    adapt(tmp_path / "vlm").save_pretrained(tmp_path / "adapted")
    for model in (
        adapt(backbone),
        CasaForConditionalGeneration.from_pretrained(tmp_path / "adapted"),
        CasaForConditionalGeneration.from_pretrained(tmp_path / "converted"),
    ):
        found = model.generation_config.to_dict()
        assert {key: found[key] for key in settings} == settings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["over text", "over a VLM", "insertion"])
def test_a_fused_model_lends_its_tower(tmp_path, kind):
    """Another text model sees with it: `vision=` a checkpoint of casa's own, wherever its tower stands."""
    fusion = FusionConfig(method="insertion") if kind == "insertion" else FusionConfig(gist=1, compressor="pool:2")
    backbone = tiny_backbone(next(iter(VLM_BACKBONES))) if kind == "over a VLM" else tiny_text_model()
    lender = adapt(backbone, fusion, vision=None if kind == "over a VLM" else tiny_encoder())
    lender.save_pretrained(tmp_path)
    lent, text = lender.encoder.state_dict(), tiny_text_model(4)
    text.save_pretrained(tmp_path / "text")
    convert(tmp_path / "text", tmp_path / "seeing", vision=tmp_path)
    for seeing in (adapt(text, vision=tmp_path), CasaForConditionalGeneration.from_pretrained(tmp_path / "seeing")):
        own = seeing.vision.state_dict()
        assert lent.keys() == own.keys()
        assert all(torch.equal(lent[name], own[name].to(lent[name].dtype)) for name in lent)


def test_the_shipped_model_lends_its_tower_by_its_name(tmp_path):
    tiny_text_model().save_pretrained(tmp_path / "text")
    convert(tmp_path / "text", tmp_path / "seeing", vision="casa-tiny")
    seeing = CasaForConditionalGeneration.from_pretrained(tmp_path / "seeing")
    lent = CasaForConditionalGeneration.from_pretrained("casa-tiny").vision.state_dict()
    own = seeing.vision.state_dict()
    assert lent.keys() == own.keys()
    assert all(torch.equal(lent[name], own[name].to(lent[name].dtype)) for name in lent)


def test_a_quantised_model_lends_no_tower(tmp_path):
    lender = adapt(tiny_text_model(), FusionConfig(), vision=tiny_encoder())
    lender.config.quantization_config = {"load_in_4bit": True}
    lender.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is quantised; take the tower of the weights it was made from"):
        load_encoder(tmp_path)
