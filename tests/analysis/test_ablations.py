"""What is taken out of a model against attention written out key by key, and its names."""

import math

import pytest
import torch

import casa.layers.step as step
from casa.analysis.ablations import ABLATIONS, ablated, others_images, parse_ablation
from casa.errors import UserError
from casa.layers import Ablation
from casa.testing import TinySample, as_batch, as_packed, tiny_casa, tiny_casa_over
from casa.windows import WindowLayout
from tests.few import few_first

ONE = TinySample((5, 9, 17, 4, 33, 8, 21), ((3, 2, 3), (5, 1, 2)))
TWO = TinySample((7, 6, 40, 11, 12), ((1, 2, 2),), seed=9)
BATCH = [ONE, TWO]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def written_out(sees):
    """Attention in plain loops, in which `sees` says of every (layer, query, kind, key, layout) whether it is seen."""
    calls = []

    def attention(query, text_key, text_value, image_key, image_value, layout, scale=None, attend="both", turn=None):
        layer = len(calls)
        calls.append(layer)
        mask, images = layout.mask(), layout.num_image
        group = query.shape[1] // text_key.shape[1]
        out = torch.zeros_like(query)
        for row in range(query.shape[0]):
            for head in range(query.shape[1]):
                scores, values = [], []
                for column in mask[row].nonzero().flatten().tolist():
                    kind = "image" if column < images else "text"
                    place = column if kind == "image" else column - images
                    if (kind == "text" and attend == "image") or not sees(layer, row, kind, place, layout):
                        continue
                    key, value = (image_key, image_value) if kind == "image" else (text_key, text_value)
                    scores.append(
                        float(query[row, head] @ key[place, head // group]) * (scale or query.shape[2] ** -0.5)
                    )
                    values.append(value[place, head // group])
                if scores:
                    top = max(scores)
                    weights = [math.exp(score - top) for score in scores]
                    out[row, head] = sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True))
        return out

    return attention


RULES = {
    "no-self-attention": lambda layer, query, kind, key, layout: kind == "image" or key != query,
    "no-text": lambda layer, query, kind, key, layout: kind == "image",
    "no-images": lambda layer, query, kind, key, layout: kind == "text",
}
FUSIONS = [
    {},
    {"placement": "before", "every": 2},
    {"placement": "replace", "layers": [1]},
    {"split": "sample"},
    {"share_weights": True},
    {"gate": "tanh"},
]


@pytest.mark.parametrize("fusion", few_first(FUSIONS, FUSIONS[::3]), ids=str)
@pytest.mark.parametrize("name", RULES)
def test_hidden_keys_are_those_of_the_loops(name, fusion, monkeypatch):
    model, inputs = tiny_casa(**fusion), as_batch(BATCH)
    with ablated(model, name):
        found = model(**inputs, use_cache=False).logits
    plain = model(**inputs, use_cache=False).logits
    monkeypatch.setattr(step, "casa_attention", written_out(RULES[name]))
    wanted = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-10)
    assert float((found - plain)[real].abs().max()) > 1e-3


def test_a_random_other_text_token_is_hidden_from_each_query(monkeypatch):
    model, inputs = tiny_casa(), ONE.inputs()
    layouts = []
    model(**inputs, use_cache=False, record=lambda *given: layouts.append(given[-1]))
    drop = Ablation(frozenset({"random_text"}), seed=3)
    cut = [drop.mask(layouts[0], layer) for layer in range(3)]
    full = layouts[0].mask()
    for mask in cut:
        gone = full & ~mask
        # the first token of a window (0, 3, 5) has no other; every later one loses one that is not itself
        assert gone.sum(1).tolist() == [0, 1, 1, 0, 1, 0, 1]
        assert not gone[:, : layouts[0].num_image].any()
        assert not gone[:, layouts[0].num_image :].diagonal().any()

    def sees(layer, query, kind, key, layout):
        # of the very call: text that sees no image may be left out of it, and draws hang on places in windows alone
        return bool(drop.mask(layout, layer)[query, key + (layout.num_image if kind == "text" else 0)])

    monkeypatch.setattr(step, "casa_attention", written_out(sees))
    wanted = model(**inputs, use_cache=False).logits
    monkeypatch.undo()
    with ablated(model, "no-random-text", seed=3):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, wanted, rtol=0, atol=1e-10)


def test_draws_differ_by_layer_query_and_seed():
    layout = WindowLayout.from_insertions([40], [[(0, 1)]])
    masks = [Ablation(frozenset({"random_text"}), seed=s).mask(layout, n) for s in (0, 1) for n in (0, 1)]
    gone = [(layout.mask() & ~mask).nonzero()[:, 1] for mask in masks]
    assert all(len(one) == 39 for one in gone)
    assert len({tuple(one.tolist()) for one in gone}) == 4
    # all over the window, not at one end
    assert all(len(set(one.tolist())) > 12 for one in gone)


@pytest.mark.parametrize(
    "fusion", few_first([{}, {"placement": "before"}, {"placement": "replace", "layers": [0, 2]}], [{}]), ids=str
)
@pytest.mark.parametrize("name", ["without-layers=0", "only-layers=2", "without-layers=0,2"])
def test_a_dropped_layer_is_one_whose_output_is_zero(name, fusion):
    model, inputs = tiny_casa(**fusion), as_batch(BATCH)
    dropped = [0, 1] if name == "only-layers=2" else [0, 2] if "0,2" in name else [0]
    with ablated(model, name):
        found = model(**inputs, use_cache=False).logits
    for block in set(dropped) & set(model.fused_blocks):
        source = model.fusion_layers.sources[model.fused_blocks.index(block)]
        for parameter in source.o_proj.parameters():
            parameter.data.zero_()
    wanted = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-12)


def test_a_gate_of_zero_is_text_alone():
    model, inputs = tiny_casa(gate="tanh"), ONE.inputs()
    with ablated(model, "no-gate"):
        found = model(**inputs, use_cache=False).logits
    assert not torch.equal(found, model(**inputs, use_cache=False).logits)
    for layer in model.casa_layers.values():
        layer.gate.data.zero_()
    assert torch.equal(found, model(**inputs, use_cache=False).logits)
    assert torch.equal(found, model(inputs["input_ids"], use_cache=False).logits)


@pytest.mark.parametrize("method", ["casa", "cross_attention", "insertion"])
def test_shuffled_images_are_those_of_the_other_sample(method):
    model = tiny_casa(method=method)
    with ablated(model, "shuffled-images"):
        found = model(**as_batch(BATCH), use_cache=False).logits
    # ONE's two pictures are both TWO's only one; TWO's is ONE's first
    swapped = [TinySample(ONE.ids, ((3, 2, 2), (5, 2, 2))), TinySample(TWO.ids, ((1, 2, 3),))]
    wanted = as_batch(swapped)
    own = as_batch(BATCH)
    pictures = own["pixel_values"].split(own["image_grid_thw"].prod(1).tolist())
    wanted["pixel_values"] = torch.cat([pictures[2], pictures[2], pictures[0]])
    assert torch.equal(found, model(**wanted, use_cache=False).logits)


KINDS = ["llama", "mistral", "gemma3_text", "qwen2_5_vl", "qwen3_vl", "smolvlm"]


@pytest.mark.parametrize("kind", few_first(KINDS, KINDS[::3]))
def test_hidden_images_of_insertion_change_nothing_about_the_text(kind):
    model = tiny_casa_over(kind, method="insertion")
    samples = [sample.in_squares() for sample in BATCH] if kind == "smolvlm" else BATCH
    inputs = as_batch(samples)
    with ablated(model, "no-images"):
        found = model(**inputs, use_cache=False).logits
        other = model(**inputs | {"pixel_values": inputs["pixel_values"] * -1.5}, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(found[real], other[real])
    plain = model(**inputs, use_cache=False).logits[real]
    assert float((found[real] - plain).abs().max()) > 1e-3
    # text before the first image knows nothing of it either way
    assert torch.allclose(found[0, :3], model(**inputs, use_cache=False).logits[0, :3], rtol=0, atol=1e-10)


def test_hidden_images_of_insertion_are_columns_of_a_mask():
    # transformers' own forward of the merged stream, with those columns hidden in a mask of its own
    from casa.models.insertion import merge

    model, inputs = tiny_casa(method="insertion"), ONE.inputs()
    with ablated(model, "no-images"):
        found = model(**inputs, use_cache=False).logits
    stream = merge(torch.ones(1, 7, dtype=torch.bool), [(0, 3), (0, 5)], [6, 2])
    images = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    embeds = stream.embeddings(model.get_input_embeddings()(inputs["input_ids"]), torch.cat(images))
    size = embeds.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril() & (~stream.is_image[0] | stream.is_image[0][:, None])
    mask = torch.zeros(size, size, dtype=torch.float64).masked_fill(~seen, -math.inf)[None, None]
    out = model.backbone(inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(size)[None]).logits
    torch.testing.assert_close(found, stream.text_of(out), rtol=0, atol=1e-10)


GENERATED = [
    "no-self-attention",
    "no-random-text",
    "no-images",
    "no-text",
    "without-layers=1",
    "no-images,only-layers=0",
]


@pytest.mark.parametrize(
    ("names", "fusion"),
    [
        (GENERATED[0], {}),
        ("no-images", {"split": "sample"}),
        *(pytest.param(names, {}, marks=pytest.mark.slow) for names in GENERATED[1:]),
        pytest.param("no-self-attention", {"placement": "replace", "layers": [0, 1]}, marks=pytest.mark.slow),
        ("no-text", {"placement": "replace", "layers": [0, 1]}),
        pytest.param("no-random-text", {"split": "sample"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_generation_with_a_cache_is_that_of_whole_passes(names, fusion):
    model = tiny_casa(**fusion)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ablated(model, *names.split(",")):
        batch = model.generate(**as_batch(BATCH), **settings)[:, 7:]
        for sample, said in zip(BATCH, batch, strict=True):
            ids = list(sample.ids)
            for token in said.tolist():
                grown = TinySample(tuple(ids), sample.pictures, sample.seed)
                assert int(model(**grown.inputs(), use_cache=False).logits[0, -1].argmax()) == token
                ids.append(token)
    assert model.ablation is None


def test_generation_of_insertion_without_its_images():
    model = tiny_casa(method="insertion")
    with ablated(model, "no-images"):
        said = model.generate(**as_batch(BATCH), max_new_tokens=5, do_sample=False, pad_token_id=0)[:, 7:]
        for sample, answer in zip(BATCH, said, strict=True):
            ids = list(sample.ids)
            for token in answer.tolist():
                grown = TinySample(tuple(ids), sample.pictures, sample.seed)
                assert int(model(**grown.inputs(), use_cache=False).logits[0, -1].argmax()) == token
                ids.append(token)


def test_packed_samples_lose_what_each_loses_alone():
    model = tiny_casa()
    with ablated(model, "no-random-text", "no-self-attention"):
        packed = model(**as_packed(BATCH)).logits[0]
        alone = [model(**sample.inputs(), use_cache=False).logits[0] for sample in BATCH]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-10)


def test_with_history_earlier_images_keep_their_distance():
    model, inputs = tiny_casa(history=1), ONE.inputs()
    with ablated(model, "no-self-attention"):
        alone = model(**inputs, use_cache=False).logits
    # nothing is hidden from the first tokens of windows but themselves; with nothing hidden it is the plain model
    model.ablation = Ablation(frozenset())
    torch.testing.assert_close(
        model(**inputs, use_cache=False).logits,
        tiny_casa(history=1)(**inputs, use_cache=False).logits,
        rtol=0,
        atol=1e-10,
    )
    assert not torch.allclose(alone, model(**inputs, use_cache=False).logits)


def test_nested_ablations_add_up_and_all_end():
    model = tiny_casa()
    with ablated(model, "no-images"):
        with ablated(model, "without-layers=1", "without-layers=2"):
            assert model.ablation == Ablation(frozenset({"images"}), frozenset({1, 2}))
        assert model.ablation == Ablation(frozenset({"images"}))
    with pytest.raises(RuntimeError), ablated(model, "no-text", "shuffled-images"):
        raise RuntimeError
    assert model.ablation is None
    assert not model._forward_pre_hooks


def test_names_are_read_back():
    for text in ("no-images", "without-layers=3,4", "only-layers=0"):
        assert str(parse_ablation(text)) == text
    assert {"no-self-attention", "no-random-text", "no-images", "shuffled-images", "no-gate"} < set(ABLATIONS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-image", "did you mean 'no-images'"),
        ("without-layers", "named by"),
        ("no-images=3", "named by"),
        ("only-layers=a", "whole numbers"),
    ],
)
def test_a_wrong_name_is_told(text, words):
    with pytest.raises(UserError, match=words):
        parse_ablation(text)


@pytest.mark.parametrize(
    ("fusion", "name", "words"),
    [
        ({}, "no-gate", "no gate"),
        ({"every": 2}, "without-layers=0", "block 0 has no fusion layer; blocks 1 have one"),
        ({"method": "insertion"}, "no-self-attention", "no fusion layers"),
        ({"method": "cross_attention"}, "no-random-text", "images alone"),
    ],
)
def test_what_a_model_does_not_have_cannot_be_taken_from_it(fusion, name, words):
    with pytest.raises(UserError, match=words), ablated(tiny_casa(**fusion), name):
        pass


def test_one_sample_has_no_other_to_take_images_from():
    model = tiny_casa()
    with ablated(model, "shuffled-images"), pytest.raises(UserError, match="batch of two or more"):
        model(**ONE.inputs())
    assert sorted(others_images([0, 1, 2])) == [0, 1, 2]
    assert all(a != b for a, b in enumerate(others_images([0, 1, 2, 3, 4], seed=5)))
