"""The model as a module: copies, gradient checkpointing, losses, dtypes, kept image features."""

import copy

import pytest
import torch
import torch.nn.functional as F

from casa import adapt
from casa.testing import TinySample, as_batch, as_packed, tiny_casa, tiny_encoder, tiny_text_model

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=10)
OTHER = TinySample((7, 30, 11), ((1, 1, 1),), seed=20)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, use_cache=False).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_a_deep_copy_is_whole_and_independent(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(**SAMPLE.inputs()).logits
        assert torch.equal(twin(**SAMPLE.inputs()).logits, wanted)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(**SAMPLE.inputs()).logits, wanted)
        assert not torch.allclose(twin(**SAMPLE.inputs()).logits, wanted)


def test_every_parameter_learns(model):
    found = gradients(model, SAMPLE.inputs())
    for name, parameter in model.named_parameters():
        assert name in found, f"{name} has no gradient"
        assert found[name].shape == parameter.shape
        # a bias of the last norm's twin or of keys may cancel; whole layers must not
        assert parameter.dim() < 2 or found[name].any(), f"{name} learns nothing"
    model.zero_grad()


def test_gradient_checkpointing_changes_no_gradient(few, close):
    model = copy.deepcopy(few).train()
    wanted = gradients(model, SAMPLE.inputs())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    passes = []
    hook = model.decoder.blocks[0].self_attn.register_forward_pre_hook(lambda *_: passes.append(1))
    found = gradients(model, SAMPLE.inputs())
    hook.remove()
    assert len(passes) == 2, "the block ran again for its backward"
    assert found.keys() == wanted.keys()
    for name in wanted:
        close(found[name], wanted[name])


def cross_entropy(logits, ids, skip=0):
    """Mean over the predictions of ids[1:], without the first `skip` of them."""
    return F.cross_entropy(logits[:-1][skip:], torch.tensor(ids[1:])[skip:])


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_labelled_tokens(few):
    inputs = SAMPLE.inputs()
    labels = inputs["input_ids"].clone()
    output = few(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits[0], SAMPLE.ids), check_dtype=False)
    labels[:, :4] = -100  # the first labelled token is predicted by the last unlabelled one
    output = few(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits[0], SAMPLE.ids, 3), check_dtype=False)


@torch.no_grad()
def test_loss_of_a_padded_batch_counts_no_padding(few):
    batch = as_batch([SAMPLE, OTHER])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 4] = -100  # the first real token follows nothing but padding
    alone = [cross_entropy(few(**s.inputs()).logits[0], s.ids) * (len(s.ids) - 1) for s in (SAMPLE, OTHER)]
    torch.testing.assert_close(few(**batch, labels=labels).loss, sum(alone) / 8, check_dtype=False)


@torch.no_grad()
def test_loss_of_packed_samples_crosses_no_border(few):
    packed = as_packed([SAMPLE, OTHER])
    alone = [cross_entropy(few(**s.inputs()).logits[0], s.ids) * (len(s.ids) - 1) for s in (SAMPLE, OTHER)]
    labels = packed["input_ids"].clone()
    loss = few(**packed, labels=labels).loss
    torch.testing.assert_close(loss, sum(alone) / 8, check_dtype=False)
    assert torch.equal(labels, packed["input_ids"]), "the caller's labels are left alone"
    loss = few(**packed, labels=labels, num_items_in_batch=16).loss
    torch.testing.assert_close(loss, sum(alone) / 16, check_dtype=False)


@torch.no_grad()
def test_kept_features_stand_for_pixels(few):
    inputs = SAMPLE.inputs()
    wanted = few(**inputs).logits
    features = few.encode_images(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    assert features.shape == (8, 24)
    assert torch.equal(few(**inputs, image_features=features).logits, wanted)


@torch.no_grad()
def test_embeddings_stand_for_ids(few):
    inputs = SAMPLE.inputs()
    wanted = few(**inputs).logits
    embeddings = few.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(few(**inputs, inputs_embeds=embeddings).logits, wanted)


@torch.no_grad()
def test_a_bias_changes_no_text_that_sees_no_image(close):
    # its biases are not zero
    backbone = tiny_text_model(attention_bias=True).eval()
    blind = TinySample((7, 30, 11), ())
    wanted = backbone(torch.tensor([blind.ids])).logits[0]
    model = adapt(backbone, vision=tiny_encoder()).eval()
    # its keys are kept for later text, so it goes through the layers
    found = model(**as_batch([SAMPLE, blind]), use_cache=True).logits[1, -len(blind.ids) :]
    close(found, wanted)


@torch.no_grad()
def test_only_the_logits_asked_for(model):
    wanted = model(**SAMPLE.inputs()).logits
    torch.testing.assert_close(model(**SAMPLE.inputs(), logits_to_keep=2).logits, wanted[:, -2:])


def test_no_cache_while_training(few):
    model = copy.deepcopy(few).train()
    assert model(**SAMPLE.inputs()).past_key_values is None


@pytest.mark.parametrize("fusion", [{}, {"placement": "replace", "every": 2}, {"method": "insertion"}])
def test_bfloat16_runs_and_is_near(fusion):
    model = tiny_casa(dtype=torch.bfloat16, **fusion)
    wide = copy.deepcopy(model).double()
    inputs = SAMPLE.inputs()
    found = model(**inputs)
    assert found.logits.dtype == torch.bfloat16
    torch.testing.assert_close(found.logits.double(), wide(**inputs).logits, rtol=0.2, atol=0.3)
    found.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits.isfinite().all()
