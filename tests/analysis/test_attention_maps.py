"""Shares of attention against sums written out one by one, and what the measurement refuses."""

import math

import pytest
import torch

from casa.analysis.attention_maps import attention_shares
from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_casa

# three tokens, an image of 6, two tokens, an image of 2, two tokens
SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((3, 2, 3), (5, 1, 2)))


def written_out(model, inputs, token, layer):
    """One query's attention, head by head and key by key: {("image" or "text", index): weight}."""
    taken = {}

    def record(number, query, text_key, image_key, layout):
        taken[number] = query.detach(), text_key.detach(), image_key.detach(), layout

    model(**inputs, use_cache=False, record=record)
    query, text_key, image_key, layout = taken[layer]
    mask, images = layout.mask()[token], layout.num_image
    heads, group = query.shape[1], query.shape[1] // text_key.shape[1]
    total = {}
    for head in range(heads):
        weights = {}
        for column in mask.nonzero().flatten().tolist():
            if column < images:
                name, key = ("image", column), image_key[column, head // group]
            elif model.fusion.attend == "both":
                name, key = ("text", column - images), text_key[column - images, head // group]
            else:
                continue
            score = sum(a * b for a, b in zip(query[token, head].tolist(), key.tolist(), strict=True))
            weights[name] = math.exp(score / math.sqrt(query.shape[2]))
        for name, weight in weights.items():
            total[name] = total.get(name, 0.0) + weight / sum(weights.values()) / heads
    return total


@pytest.mark.parametrize(
    "fusion", [{}, {"placement": "before", "every": 2}, {"split": "sample"}, {"method": "cross_attention"}], ids=str
)
def test_shares_are_the_sums_written_out(fusion):
    model, inputs = tiny_casa(**fusion), SAMPLE.inputs()
    shares = attention_shares(model, inputs)
    assert shares.tokens == (3, 4, 5, 6)
    torch.testing.assert_close(shares.own + shares.other_text + shares.image, torch.ones_like(shares.own))
    for layer in range(len(shares.blocks)):
        for column, token in enumerate(shares.tokens):
            wanted = written_out(model, inputs, token, layer)
            text = {name[1]: weight for name, weight in wanted.items() if name[0] == "text"}
            images = [weight for name, weight in wanted.items() if name[0] == "image"]
            others = [weight for index, weight in text.items() if index != token]
            assert float(shares.own[layer, column]) == pytest.approx(text.get(token, 0.0), abs=1e-12)
            assert float(shares.other_text[layer, column]) == pytest.approx(sum(others), abs=1e-12)
            assert float(shares.per_image_token[layer, column]) == pytest.approx(sum(images) / len(images), abs=1e-12)
            assert (int(shares.num_image[column]), int(shares.num_other[column])) == (len(images), len(others))


def test_a_map_lays_the_weights_of_one_image_out_in_rows():
    model, inputs = tiny_casa(), SAMPLE.inputs()
    shares = attention_shares(model, inputs, [4, 6])
    first, second = shares.image_map(1, 4, image=0), shares.image_map(1, 6)
    assert (first.shape, second.shape) == ((2, 3), (1, 2))
    wanted = written_out(model, inputs, 4, 1)
    assert float(first[1, 0]) == pytest.approx(wanted["image", 3], abs=1e-12)
    # token 6 is in the window of the second image and does not see the first
    assert float(shares.image_map(1, 6, image=0).abs().max()) == 0
    assert float(second.sum()) == pytest.approx(float(shares.image[1, 1]))
    assert float(shares.image_map(shares.sharpest_layer(4, 0), 4, 0).max()) == pytest.approx(
        max(float(shares.image_map(layer, 4, 0).max()) for layer in range(3))
    )


@pytest.mark.parametrize(("compressor", "shape"), [("pool:2", (1, 2)), ("q_former:3", (1, 3))])
def test_a_map_of_compressed_images_lies_in_their_own_rows(compressor, shape):
    model = tiny_casa(compressor=compressor)
    shares = attention_shares(model, TinySample((5, 9, 17), ((1, 2, 4),)).inputs(), [2])
    assert tuple(shares.image_map(0, 2).shape) == shape
    assert float(shares.image_map(0, 2).sum()) == pytest.approx(float(shares.image[0, 0]))


def test_earlier_images_are_turned_to_their_distance(monkeypatch):
    # what the layers themselves give, seen through values that are one for an image and zero elsewhere
    model, inputs = tiny_casa(history=1), SAMPLE.inputs()
    import casa.layers.step as step
    from casa.attention import casa_attention

    marked = []

    def spy(query, text_key, text_value, image_key, image_value, layout, **options):
        ones = torch.zeros_like(image_value)
        ones[:6] = 1
        marked.append(casa_attention(query, text_key, torch.zeros_like(text_value), image_key, ones, layout, **options))
        return casa_attention(query, text_key, text_value, image_key, image_value, layout, **options)

    monkeypatch.setattr(step, "casa_attention", spy)
    shares = attention_shares(model, inputs)
    for layer, out in enumerate(marked):
        for token in (5, 6):
            found = float(shares.image_map(layer, token, image=0).sum())
            assert found == pytest.approx(float(out[token].mean()), abs=1e-6)  # rotary factors are float32
            assert found > 1e-4


def test_text_that_sees_no_image_can_be_asked_for():
    shares = attention_shares(tiny_casa(), SAMPLE.inputs(), [0, 2])
    assert float(shares.image.abs().max()) == 0
    torch.testing.assert_close(shares.own + shares.other_text, torch.ones_like(shares.own))
    assert bool(shares.per_image_token.isnan().all())


def test_bad_requests_are_refused_by_name():
    model, inputs = tiny_casa(), SAMPLE.inputs()
    with pytest.raises(UserError, match=r"out of range 0\.\.6"):
        attention_shares(model, inputs, [7])
    with pytest.raises(UserError, match="one text"):
        attention_shares(model, as_batch([SAMPLE, SAMPLE]))
    with pytest.raises(UserError, match="no CASA layers"):
        attention_shares(tiny_casa(method="insertion"), inputs)
    with pytest.raises(UserError, match="has no image"):
        attention_shares(model, TinySample((5, 6)).inputs())
    with pytest.raises(UserError, match="not measured"):
        attention_shares(model, inputs, [4]).image_map(0, 5)
    with pytest.raises(UserError, match="past_key_values"):
        attention_shares(model, {**inputs, "past_key_values": model.new_cache()})
