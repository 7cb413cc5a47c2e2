"""Shares of attention against sums written out one by one, and what the measurement refuses."""

import math

import pytest
import torch

import casa.analysis.attention_maps as attention_maps
import casa.layers.step as step
from casa.analysis import AttentionShares, ablated, attention_shares
from casa.attention import casa_attention
from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_casa, tiny_casa_over
from casa.windows import ImageSpan
from tests.few import few_first

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
    "fusion",
    few_first([{}, {"placement": "before", "every": 2}, {"split": "sample"}, {"method": "cross_attention"}], [{}]),
    ids=str,
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
    with pytest.raises(UserError, match="has no image"):
        attention_shares(model, TinySample((5, 6)).inputs())
    with pytest.raises(UserError, match="not measured"):
        attention_shares(model, inputs, [4]).image_map(0, 5)
    with pytest.raises(UserError, match="past_key_values"):
        attention_shares(model, {**inputs, "past_key_values": model.new_cache()})


@torch.no_grad()
@pytest.mark.parametrize(
    "fusion",
    [
        {},
        {"placement": "before", "every": 2},
        {"placement": "replace", "layers": [1]},
        {"split": "sample"},
        {"history": 1},
        {"method": "cross_attention"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", few_first(["llama", "smollm3", "helium"], ["llama"]))
def test_every_head_is_that_of_the_reference(kind, fusion, monkeypatch):
    model, inputs = tiny_casa_over(kind, **fusion), SAMPLE.inputs()
    wanted = []

    def spy(query, text_key, text_value, image_key, image_value, layout, **options):
        """The reference over values that are one at a single key tells the weight of that key, D keys at a time."""
        arguments = [x.double() for x in (query, text_key, text_value, image_key, image_value)]
        count, width = layout.num_image + layout.num_text, query.shape[2]
        found = []
        for first in range(0, count, width):
            marks = torch.zeros(count, image_key.shape[1], width, dtype=torch.float64)
            for column in range(first, min(first + width, count)):
                marks[column, :, column - first] = 1
            arguments[2], arguments[4] = marks[layout.num_image :], marks[: layout.num_image]
            found.append(casa_attention(*arguments, layout, impl="reference", **options))
        wanted.append(torch.cat(found, -1)[..., :count].transpose(0, 1))  # (Hq, T, N + T)
        return casa_attention(query, text_key, text_value, image_key, image_value, layout, **options)

    monkeypatch.setattr(step, "casa_attention", spy)
    shares = attention_shares(model, inputs, range(7))
    # with history, keys are turned by factors that transformers makes in float32
    torch.testing.assert_close(
        shares.weights, torch.stack(wanted), rtol=0, atol=1e-6 if fusion.get("history") else 1e-12
    )
    total = torch.ones_like(shares.shares[0])
    if fusion.get("method") == "cross_attention":
        total[..., :3] = 0  # nothing is seen before the first image
    torch.testing.assert_close(shares.shares.sum(0), total, rtol=0, atol=1e-12)


KINDS = ["llama", "mistral", "qwen3", "gemma3_text", "qwen2_5_vl", "qwen3_vl", "smolvlm"]


@torch.no_grad()
@pytest.mark.parametrize("kind", few_first(KINDS, KINDS[::3]))
@pytest.mark.parametrize("method", ["insertion", "casa"])
def test_self_attention_is_that_of_transformers(kind, method):
    model = tiny_casa_over(kind, method=method)
    sample = SAMPLE.in_squares() if kind == "smolvlm" else SAMPLE
    inputs = sample.inputs()
    shares = attention_shares(model, inputs, range(7), self_attention=True)
    plain = model(**inputs, use_cache=False).logits
    model.backbone.set_attn_implementation("eager")
    out = model(**inputs, use_cache=False, output_attentions=True)
    torch.testing.assert_close(plain, out.logits, rtol=0, atol=1e-5)
    wanted = torch.stack(out.attentions)[:, 0]  # (L, Hq, S, S)
    first, second = (4, 4) if kind == "smolvlm" else (6, 2)
    text = [*range(7)]
    columns = text
    if method == "insertion":
        # three tokens, the first picture, two tokens, the second, two tokens
        text = [0, 1, 2, 3 + first, 4 + first, 5 + first + second, 6 + first + second]
        columns = [*range(3, 3 + first), *range(5 + first, 5 + first + second), *text]
    wanted = wanted[:, :, text][..., columns]
    # eager attention takes its softmax in float32
    torch.testing.assert_close(shares.weights, wanted.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(shares.shares.sum(0), torch.ones_like(shares.shares[0]))
    assert shares.blocks == tuple(range(3))
    if method == "insertion":
        assert shares.num_image.tolist() == [0, 0, 0, first, first, first + second, first + second]
        assert shares.image_map(1, 6, image=0, head=2).flatten().tolist() == shares.weights[1, 2, 6, :first].tolist()
    # nothing stays behind
    assert model.backbone.config.get_text_config()._attn_implementation == "eager"
    assert not any(block.self_attn._forward_pre_hooks for block in model.decoder.blocks)


def test_self_attention_sees_no_image_unless_it_is_inserted():
    shares = attention_shares(tiny_casa(), SAMPLE.inputs(), self_attention=True)
    assert (shares.tokens, shares.num_columns, shares.grids) == (tuple(range(7)), 0, ())


def test_a_sink_draws_the_others_whatever_they_say(monkeypatch):
    monkeypatch.setattr(attention_maps, "SINK_SHARE", 0.15)
    sample = TinySample(tuple(range(3, 15)), ((1, 2, 3),))
    for method in ("casa", "insertion"):
        shares = attention_shares(tiny_casa(method=method), sample.inputs(), range(12))
        others = shares.weights.clone()
        seen = torch.ones(12, 18, dtype=torch.bool)
        seen[:, 6:] = torch.ones(12, 12).tril(-1)
        seen[0, :6] = False
        if method == "casa":
            seen[1:, 6] = False  # of an earlier window
        counts = seen.sum(0)
        mean = (others * seen).sum(2) / counts
        wanted = (mean > 0.15) & (counts >= 4)
        assert torch.equal(shares.sinks, wanted)
        assert wanted.any()
        assert float(shares.shares[3].max()) > 0.15


def test_shares_are_parted_where_sinks_stand():
    # one layer, one head, one token (the second of three) over two image tokens and three text tokens
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0], dtype=torch.float64).view(1, 1, 1, 5)
    sinks = torch.tensor([False, True, True, True, False]).view(1, 1, 5)
    shares = AttentionShares(
        (0,), (1,), weights, sinks, torch.tensor([1]), torch.tensor([2]), (ImageSpan(0, 2, 0),), ((1, 2),)
    )
    # itself 0.3 stays its own; the other text is a sink; of the image one token is
    torch.testing.assert_close(shares.shares.flatten(), torch.tensor([0.3, 0.0, 0.1, 0.6], dtype=torch.float64))
    assert [float(x) for x in (shares.own, shares.other_text, shares.image)] == pytest.approx([0.3, 0.2, 0.5])
    spread = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert float(shares.image_entropy()) == pytest.approx(spread)


@pytest.mark.parametrize(("name", "kind"), [("no-self-attention", 0), ("no-text", 1), ("no-images", 2)])
def test_what_is_taken_out_of_a_model_has_no_share(name, kind):
    model = tiny_casa()
    with ablated(model, name):
        shares = attention_shares(model, SAMPLE.inputs())
    assert float(shares.heads[kind].abs().max()) == 0
    assert float(shares.shares.sum(0).max()) == pytest.approx(1)
