"""adapt takes a text model over as it is: its text-only logits, its weights and their names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from casa import FusionConfig, adapt
from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_backbone, tiny_casa, tiny_encoder, tiny_text_model
from casa.testing.drawn import SEVERAL
from tests.few import few_first

ADDING = [
    {},
    {"placement": "before"},
    {"share_weights": True},
    {"history": 1},
    {"split": "sample"},
    {"placement": "before", "split": "sample", "history": -1},
    {"method": "cross_attention"},
    {"method": "cross_attention", "gate": "tanh"},
    {"method": "cross_attention", "share_weights": True},
    {"method": "insertion"},
]
REPLACING = [{"placement": "replace", "every": 2}, {"placement": "replace", "layers": [0]}]
BORROWING = [{"share_weights": True}, {"method": "cross_attention", "share_weights": True}, *REPLACING]
named = lambda fusion: "-".join(f"{k}={v}" for k, v in fusion.items()) or "default"  # noqa: E731


@torch.no_grad()
@pytest.mark.parametrize("fusion", few_first(ADDING, ADDING[::3]), ids=named)
def test_text_only_logits_are_the_text_models_own_bit_for_bit(fusion):
    ids = torch.tensor([[5, 9, 17, 4, 33, 8], [6, 7, 8, 9, 10, 11]])
    wanted = tiny_text_model().eval()(input_ids=ids).logits
    model = tiny_casa(**fusion)
    assert torch.equal(model(input_ids=ids).logits, wanted)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)


@pytest.fixture(scope="module")
def text_model():
    return tiny_text_model().eval()


@pytest.mark.parametrize(
    "name", few_first(["parallel", "before shared", "history 1", "sample", "cross", "insertion"], ["before shared"])
)
@SEVERAL
@given(rows=st.integers(1, 9).flatmap(lambda n: st.lists(st.tuples(*[st.integers(3, 60)] * n), min_size=1, max_size=3)))
def test_logits_of_any_text_alone_are_the_text_models_own_bit_for_bit(casa_of, text_model, name, rows):
    ids, model = torch.tensor(rows), casa_of(name)
    with torch.no_grad():
        wanted = text_model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, wanted)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("fusion", few_first(ADDING, ADDING[::3]), ids=named)
def test_text_that_sees_no_image_is_unchanged(fusion):
    sample = TinySample((5, 9, 17, 4, 33, 8), ((3, 2, 2),))
    wanted = tiny_text_model().eval()(input_ids=torch.tensor([sample.ids])).logits
    found = tiny_casa(**fusion)(**sample.inputs()).logits
    torch.testing.assert_close(found[:, :3], wanted[:, :3], rtol=1e-12, atol=1e-12)
    assert (found[:, 3:] - wanted[:, 3:]).abs().amin(-1).max() > 1e-6, "the image matters to text behind it"


@pytest.mark.parametrize("fusion", few_first(ADDING + REPLACING, ADDING[::3] + REPLACING[:1]), ids=named)
def test_every_weight_keeps_value_and_name_below_one_prefix(fusion):
    before = tiny_text_model().state_dict()
    after = tiny_casa(**fusion).state_dict()
    below = {name.removeprefix("backbone."): t for name, t in after.items() if name.startswith("backbone.")}
    assert below.keys() == before.keys()
    assert all(torch.equal(below[name], before[name]) for name in before)
    rest = {name.split(".")[0] for name in after if not name.startswith("backbone.")}
    assert rest <= {"vision", "projector", "casa_layers"}


def test_the_text_model_is_taken_over_not_copied():
    text = tiny_text_model()
    model = adapt(text, vision=tiny_encoder())
    assert dict(model.backbone.named_parameters())["model.embed_tokens.weight"] is text.model.embed_tokens.weight
    assert model.backbone is text


@torch.no_grad()
def test_layers_start_as_copies_of_their_blocks_self_attention():
    model = tiny_casa(every=2)
    assert list(model.casa_layers) == ["1"]
    block = model.backbone.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        mine, theirs = model.casa_layers["1"].get_submodule(name), block.get_submodule(name)
        assert torch.equal(mine.weight, theirs.weight)
        assert mine.weight.data_ptr() != theirs.weight.data_ptr()


@pytest.mark.parametrize("fusion", BORROWING, ids=named)
def test_borrowed_layers_have_no_weights_of_their_own(fusion):
    assert not list(tiny_casa(**fusion).casa_layers.parameters())


@torch.no_grad()
def test_a_closed_gate_hides_the_images():
    model = adapt(tiny_text_model(), FusionConfig(method="cross_attention", gate="tanh"), vision=tiny_encoder()).eval()
    sample = TinySample((5, 9, 17), ((0, 2, 2),))
    wanted = model(input_ids=torch.tensor([sample.ids])).logits
    assert torch.equal(model(**sample.inputs()).logits, wanted)


@torch.no_grad()
def test_biases_and_wide_heads_come_along(close):
    text = tiny_text_model(attention_bias=True, head_dim=16, num_key_value_heads=1)
    model = adapt(text, FusionConfig(placement="before"), vision=tiny_encoder()).eval()
    rows = [TinySample((5, 9, 17, 4), ((1, 2, 2),)), TinySample((7, 8), ((0, 1, 2),))]
    logits = model(**as_batch(rows)).logits
    for row, sample in zip(logits, rows, strict=True):
        close(row[-len(sample.ids) :], model(**sample.inputs()).logits[0])
    assert model.casa_layers["0"].k_proj.bias is not None


def test_adapt_from_folders_is_adapt_of_the_models(tmp_path):
    text, encoder = tiny_text_model(dtype=torch.float32), tiny_encoder(dtype=torch.float32)
    text.save_pretrained(tmp_path / "text")
    encoder.save_pretrained(tmp_path / "vision")
    loaded = adapt(str(tmp_path / "text"), vision=tmp_path / "vision").state_dict()
    for name, tensor in (adapt(text, vision=encoder)).state_dict().items():
        if not name.startswith("projector."):
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("backbone", "vision", "words"),
    [
        (
            GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5)),
            None,
            "'gpt2' is not a model that casa knows",
        ),
        (nn.Linear(1, 1), None, "give a transformers model or its path"),
        ("./nowhere", None, "there is no model at './nowhere'"),
        (tiny_text_model(), None, "pass vision="),
        (tiny_text_model(), tiny_text_model(), "'llama' is not an image encoder"),
        (tiny_text_model(), "./nowhere", "there is no model at './nowhere'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(backbone, vision, words):
    with pytest.raises(UserError, match=words):
        adapt(backbone, vision=vision)


@pytest.mark.parametrize("fusion", [{}, {"placement": "before"}, {"placement": "replace", "every": 2}], ids=named)
def test_a_backbone_takes_the_layers_of_one_model_only(fusion):
    backbone = tiny_text_model()
    adapt(backbone, FusionConfig(**fusion), vision=tiny_encoder())
    with pytest.raises(UserError, match="has fusion layers already"):
        adapt(backbone, FusionConfig(**fusion), vision=tiny_encoder())


@torch.no_grad()
@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_a_tower_of_another_dtype_joins_in_the_text_models(method):
    model = adapt(tiny_text_model(), FusionConfig(method=method), vision=tiny_encoder(dtype=torch.float32))
    sample = TinySample((5, 9, 17), ((1, 2, 2),))
    assert model(**sample.inputs()).logits.dtype == torch.float64


@torch.no_grad()
def test_a_padded_batch_runs_under_autocast():
    model = tiny_casa(dtype=torch.float32, gate="tanh")
    batch = as_batch([TinySample((5, 9, 17), ((1, 2, 2),)), TinySample((7, 8), ((0, 1, 2),))])
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    wanted = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch).logits
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def _without(tensors):
    return {name: t for name, t in tensors.items() if "o_proj" not in name}


def test_a_text_model_with_missing_weights_or_a_pickle_is_refused(tmp_path):
    text = tiny_text_model()
    text.save_pretrained(tmp_path / "missing", state_dict=_without(text.state_dict()))
    with pytest.raises(UserError, match="missing"):
        adapt(tmp_path / "missing", vision=tiny_encoder())
    text.config.save_pretrained(tmp_path / "pickle")
    torch.save(text.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        adapt(tmp_path / "pickle", vision=tiny_encoder())


@pytest.mark.parametrize("fusion", [{}, {"method": "insertion"}], ids=named)
@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_in_the_mode_that_its_backbone_was_in(fusion, train, tmp_path):
    for backbone, vision in ((tiny_text_model(), tiny_encoder()), (tiny_backbone("qwen2_5_vl"), None)):
        model = adapt(backbone.train(train), FusionConfig(**fusion), vision=vision)
        assert {module.training for module in model.modules()} == {train}
    # and so is one that is given layers later
    if fusion:
        assert {module.training for module in adapt(model).modules()} == {train}
    tiny_text_model().save_pretrained(tmp_path)
    assert not adapt(str(tmp_path), FusionConfig(**fusion), vision=tiny_encoder()).training
