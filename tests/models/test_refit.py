"""An insertion model of casa's own as a backbone: its parts stay what they were, and layers are added to them."""

from types import SimpleNamespace

import pytest
import torch

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.models.adapt import skeleton
from casa.models.auto import auto_processor
from casa.models.convert import convert
from casa.testing import TinySample, tiny_casa, tiny_casa_over, tiny_checkpoint, tiny_encoder, tiny_text_model

SAMPLE = TinySample((5, 6, 7, 8, 9), ((2, 2, 3),))


@pytest.mark.parametrize("shared", [False, True])
def test_text_is_as_before_and_images_are_seen_anew(shared):
    before = tiny_casa(method="insertion")
    text = torch.tensor([[4, 5, 6]])
    alone, seen = before(input_ids=text).logits, before(**SAMPLE.inputs()).logits
    weights = {name: p.clone() for name, p in before.named_parameters()}
    model = adapt(before, FusionConfig(share_weights=shared))
    assert torch.equal(model(input_ids=text).logits, alone)
    assert not torch.allclose(model(**SAMPLE.inputs()).logits, seen)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert {name.split(".")[0] for name in found.keys() - weights.keys()} == (set() if shared else {"casa_layers"})


def test_layers_and_the_towers_last_blocks_are_left_to_training():
    model = adapt(tiny_casa(method="insertion"))
    trained = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"casa_layers.0", "casa_layers.1", "casa_layers.2", "vision.blocks"}
    assert not any(p.requires_grad for p in model.projector.parameters())


def test_of_a_vlm_too():
    before = tiny_casa_over("qwen2_5_vl", method="insertion")
    alone = before(input_ids=torch.tensor([[4, 5, 6]])).logits
    model = adapt(before, FusionConfig(placement="before"))
    assert torch.equal(model(input_ids=torch.tensor([[4, 5, 6]])).logits, alone)
    assert model.fusion.placement == "before"


def test_compressor_and_gist_come_along():
    choice = {"compressor": "q_former:2", "gist": 2}
    before = tiny_casa(method="insertion", **choice)
    weights = {n: p.clone() for n, p in before.named_parameters() if n.startswith(("compressor", "gist"))}
    model = adapt(before, FusionConfig(**choice))
    assert weights
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
    with pytest.raises(UserError, match="gist=2; give fusion the same"):
        adapt(tiny_casa(method="insertion", **choice), FusionConfig(compressor="q_former:2"))
    with pytest.raises(UserError, match="projector=mlp; give fusion the same"):
        adapt(tiny_casa(method="insertion"), FusionConfig(projector="linear"))


@pytest.mark.slow
def test_folder_to_folder(tmp_path):
    before = tiny_checkpoint(tmp_path / "before", method="insertion")
    outlined = convert(before, tmp_path / "after", beside=auto_processor(before).save_pretrained)
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "after")
    inputs = SAMPLE.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    assert torch.equal(model(**inputs).logits, adapt(before).eval()(**inputs).logits)
    assert {p.device.type for p in outlined.parameters()} == {"meta"}
    drawn = skeleton(CasaForConditionalGeneration.from_pretrained(before).config, FusionConfig())
    assert drawn.state_dict().keys() == model.state_dict().keys()
    assert CasaProcessor.from_pretrained(tmp_path / "after").stream_prompt == "say it"


def test_in_another_dtype_and_never_over_a_full_disk(tmp_path, monkeypatch):
    before = tiny_checkpoint(tmp_path / "before", method="insertion")
    convert(before, tmp_path / "half", dtype=torch.bfloat16)
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="free some space"):
        convert(before, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_what_cannot_be_refitted_is_refused(tmp_path):
    with pytest.raises(UserError, match="has fusion layers already"):
        adapt(tiny_casa())
    with pytest.raises(UserError, match="of its own; leave out vision"):
        adapt(tiny_casa(method="insertion"), vision=tiny_encoder())
    with pytest.raises(UserError, match="has fusion layers already"):
        convert(tiny_checkpoint(tmp_path / "fused"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_counted_once(tmp_path):
    tied = tiny_text_model(tie_word_embeddings=True)
    adapt(tied, FusionConfig.insertion(), tiny_encoder()).save_pretrained(tmp_path / "inserted")
    told = convert(tmp_path / "inserted", tmp_path / "fused")
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "fused")
    assert sum(p.numel() for p in told.parameters()) == sum(p.numel() for p in model.parameters())
