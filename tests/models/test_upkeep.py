"""A changed vocabulary leaves old tokens as they were; checkpointed activations leave gradients as they were."""

import pytest
import torch

from casa import CasaForConditionalGeneration, FusionConfig, adapt
from casa.errors import UserError
from casa.testing import TinySample, tiny_backbone, tiny_casa, tiny_casa_over, tiny_encoder, tiny_text_model

IDS = torch.tensor([[5, 9, 17, 4]])
SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))


def tied_vlm():
    """SmolVLM, with its head tied to its embeddings."""
    config = tiny_backbone("smolvlm").config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    backbone = type(tiny_backbone("smolvlm"))(config).double().eval()
    assert backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight
    return adapt(backbone).eval()


VOCABULARIES = {
    "text": lambda: tiny_casa(),
    "text, tied": lambda: adapt(tiny_text_model(tie_word_embeddings=True), vision=tiny_encoder()).eval(),
    "vlm": lambda: tiny_casa_over("qwen2_5_vl"),
    "vlm, tied": tied_vlm,
    "insertion": lambda: tiny_casa_over("qwen2_5_vl", method="insertion"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VOCABULARIES)
@torch.no_grad()
def test_old_tokens_keep_their_logits_in_another_vocabulary(kind, tmp_path):
    model = VOCABULARIES[kind]()
    tied = model.config.tie_word_embeddings
    before = model(input_ids=IDS).logits
    for size in (70, 50):
        model.resize_token_embeddings(size)
        logits = model(input_ids=IDS).logits
        assert logits.shape[-1] == size
        kept = min(size, before.shape[-1])
        # a product of another size may add up in another order
        torch.testing.assert_close(logits[..., :kept], before[..., :kept], rtol=1e-12, atol=1e-12)
        assert model.config.get_text_config().vocab_size == model.decoder.config.vocab_size == size
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    loss = model(input_ids=IDS, labels=IDS).loss
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_new_tokens_work_beside_images():
    model = tiny_casa()
    model.resize_token_embeddings(pad_to_multiple_of=32)
    sample = TinySample((5, 63, 17), ((1, 2, 2),))
    assert model(**sample.inputs()).logits.shape == (1, 3, 64)


def test_gist_tokens_keep_their_ids():
    model = adapt(tiny_text_model(), FusionConfig(gist=2), vision=tiny_encoder())
    with pytest.raises(UserError, match="gist tokens have ids behind its vocabulary"):
        model.resize_token_embeddings(70)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def checkpoint(model, *how):
    """By the name that the installed transformers knows without a warning."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(*how)


def gradients(model):
    model.zero_grad()
    inputs = SAMPLE.inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


FUSIONS = [{}, {"placement": "before"}, {"placement": "replace", "every": 2}, {"update_images": True}]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("fusion", [*FUSIONS, {"method": "insertion"}, {"method": "cross_attention"}], ids=str)
def test_checkpointed_gradients_are_the_same(kind, fusion):
    model = tiny_casa_over(kind, **fusion).train()
    wanted = gradients(model)
    checkpoint(model)
    calls = []
    # recomputing stops where nothing more is needed, so what comes first in the block is watched
    hook = model.decoder.blocks[1].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model)
    hook.remove()
    assert model.checkpoints_blocks
    assert len(calls) >= 2, "the block runs again in the backward pass"
    assert found.keys() == wanted.keys()
    assert any("casa_layers" in name for name in wanted) == (
        fusion.get("method") != "insertion" and "replace" not in fusion.values()
    )
    assert any(".visual." in name or "vision." in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_reentrant_checkpointing_is_refused():
    model = tiny_casa()
    with pytest.raises(UserError, match="use_reentrant=True loses the gradients of images"):
        checkpoint(model, {"use_reentrant": True})
    checkpoint(model, {"preserve_rng_state": False})
    assert model.checkpoints_blocks


def test_checkpointing_keeps_no_cache():
    model = tiny_casa().train()
    checkpoint(model)
    with pytest.raises(UserError, match="keeps no cache"):
        model(**SAMPLE.inputs(), use_cache=True)
    assert model(**SAMPLE.inputs()).past_key_values is None
    assert model.eval()(**SAMPLE.inputs(), use_cache=True).past_key_values.num_text == 7
