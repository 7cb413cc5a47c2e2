"""Keys and values of images made ahead are those that the model makes itself, for every family and variant."""

import pytest
import torch

from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_casa, tiny_casa_over

SAMPLE = TinySample(ids=(3, 8, 9, 7, 11, 12, 9), pictures=((1, 2, 2), (4, 2, 4)))


def ahead(model, inputs):
    """The same inputs, with keys and values in place of pixels."""
    given = dict(inputs)
    features = model.encode_images(given.pop("pixel_values"), given["image_grid_thw"])
    return given | {"image_keys_values": model.image_keys_values(features, given["image_grid_thw"])}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
@torch.no_grad()
def test_of_every_kind_of_model(kind):
    model = tiny_casa_over(kind).eval()
    sample = SAMPLE.in_squares() if kind == "smolvlm" else SAMPLE
    inputs = as_batch([sample])
    torch.testing.assert_close(model(**ahead(model, inputs)).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "fusion",
    [
        {"placement": "replace", "every": 2},
        {"share_weights": True},
        {"method": "cross_attention", "gate": "tanh"},
        {"update_images": True},
        {"compressor": "pool:2"},
        {"compressor": "q_former:3"},
        {"layers": [0]},
    ],
    ids=str,
)
@torch.no_grad()
def test_of_every_variant(fusion):
    model, inputs = tiny_casa(**fusion), as_batch([SAMPLE])
    torch.testing.assert_close(model(**ahead(model, inputs)).logits, model(**inputs).logits, rtol=0, atol=0)


def test_gradients_pass_through_them():
    model, inputs = tiny_casa(), as_batch([SAMPLE])
    model(**ahead(model, inputs)).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    model, inputs = tiny_casa(), as_batch([SAMPLE])
    given = ahead(model, inputs)
    with pytest.raises(UserError, match="does not describe"):
        model(**(given | {"image_keys_values": given["image_keys_values"][1:]}))
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**given, **beams), model.generate(**inputs, **beams))
    inserting = tiny_casa(method="insertion")
    features = inserting.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    with pytest.raises(UserError, match="no fusion layers"):
        inserting.image_keys_values(features, inputs["image_grid_thw"])
    with pytest.raises(UserError, match="takes no image_keys_values"):
        inserting(**given)
