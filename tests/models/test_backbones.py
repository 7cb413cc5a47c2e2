"""Every family that casa knows, as a tiny random model in float64: what holds for one holds for all."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from casa import CasaForConditionalGeneration, FusionConfig, adapt
from casa.errors import UserError
from casa.layers import project_images, rms_norm
from casa.testing import (
    BACKBONES,
    TEXT_BACKBONES,
    VLM_BACKBONES,
    TinySample,
    as_batch,
    as_packed,
    tiny_backbone,
    tiny_casa_over,
    tiny_encoder,
)
from tests.few import few_first
from tests.models.conftest import FAMILIES

IDS = torch.tensor([[5, 9, 17, 4, 33, 8, 21, 30, 11]])
SAMPLES = (
    TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=10),
    TinySample((7, 30, 11, 12), (), seed=20),
    TinySample((40, 6, 13, 22, 50), ((0, 2, 2), (0, 1, 1), (3, 3, 1)), seed=30),
)


# what a fusion layer borrows, looks at and is placed by, over every family
FUSIONS = [
    {"placement": "before"},
    {"placement": "replace", "every": 2},
    {"share_weights": True},
    {"method": "cross_attention", "gate": "tanh"},
    {"method": "cross_attention", "share_weights": True},
    {"history": 1},
    {"update_images": True},
    {"compressor": "pool:2"},
]
MULTIPLY_IN_FLOAT32 = ("helium", "gemma3_text")  # their norms' gains


@pytest.fixture(scope="module", params=few_first(BACKBONES, FAMILIES))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def samples(kind):
    """SmolVLM's tower takes squares of one size."""
    return tuple(sample.in_squares() for sample in SAMPLES) if kind == "smolvlm" else SAMPLES


@pytest.fixture(scope="module")
def model(kind):
    return tiny_casa_over(kind)


def alone(model, samples):
    return [model(**sample.inputs()).logits[0] for sample in samples]


def open_gates(model):
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "fusion",
    [
        {},
        {"placement": "before"},
        {"share_weights": True},
        {"split": "sample"},
        {"method": "cross_attention", "gate": "tanh"},
        {"method": "insertion"},
    ],
    ids=str,
)
@torch.no_grad()
def test_text_alone_is_the_backbone_bit_for_bit(kind, fusion):
    backbone = tiny_backbone(kind)
    wanted = backbone(input_ids=IDS).logits.clone()
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    vision = tiny_encoder() if kind in TEXT_BACKBONES else None
    model = open_gates(adapt(backbone, FusionConfig(**fusion), vision=vision).eval())
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, wanted)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), plain(kind, 4))
    state = model.state_dict()
    assert {name for name in state if name.startswith("backbone.")} == {f"backbone.{name}" for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(state[f"backbone.{name}"], tensor), name


def plain(kind, count):
    """Greedy tokens of the backbone, one full pass each."""
    backbone, ids = tiny_backbone(kind), IDS
    for _ in range(count):
        ids = torch.cat([ids, backbone(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == 2:
            break
    return ids


@torch.no_grad()
def test_packed_samples_are_each_sample_alone(model, samples, close):
    close(model(**as_packed(samples)).logits[0], torch.cat(alone(model, samples)))


@torch.no_grad()
def test_left_padded_rows_are_each_row_alone(model, samples, close):
    logits = model(**as_batch(samples)).logits
    for row, sample, wanted in zip(logits, samples, alone(model, samples), strict=True):
        close(row[-len(sample.ids) :], wanted)


@pytest.mark.slow
@torch.no_grad()
def test_pieces_are_one_pass(model, samples, close):
    for sample, wanted in zip(samples, alone(model, samples), strict=True):
        cache, found = None, []
        for call in sample.calls(range(1, len(sample.ids))):
            output = model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
        close(torch.cat(found), wanted)
        assert cache.text.get_seq_length() == len(sample.ids), "the text model's cache holds text only"


@torch.no_grad()
def test_images_matter_and_the_future_does_not(model, samples):
    first, other = samples[0], replace(samples[0], seed=77)
    changed = (model(**first.inputs()).logits - model(**other.inputs()).logits)[0].abs().amax(-1)
    assert float(changed[:2].max()) == 0, "text before the image"
    assert float(changed[2:].min()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [*FUSIONS, {"method": "insertion"}], ids=str)
@torch.no_grad()
def test_variants_keep_packed_batched_and_pieces_equal(kind, samples, fusion, close):
    model = open_gates(tiny_casa_over(kind, **fusion))
    wanted = alone(model, samples)
    close(model(**as_packed(samples)).logits[0], torch.cat(wanted))
    logits = model(**as_batch(samples)).logits
    for row, sample, one in zip(logits, samples, wanted, strict=True):
        close(row[-len(sample.ids) :], one)
    cache, found = None, []
    for call in samples[0].calls([1, 3, 5, 6]):
        output = model(**call, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    close(torch.cat(found), wanted[0])
    assert cache.image_tokens > 0


@pytest.mark.slow
@torch.no_grad()
def test_gradients_of_packed_rows_are_those_of_each_sample(kind, samples):
    with torch.enable_grad():
        model = tiny_casa_over(kind)
        weights = torch.randn(sum(len(s.ids) for s in samples), 61, dtype=torch.float64)
        names = [name for name, _ in model.named_parameters() if name.startswith("casa_layers") or ".mlp." in name]
        wanted_of = [model.get_parameter(name) for name in names if "visual" not in name and "vision" not in name]
        packed = (model(**as_packed(samples)).logits[0] * weights).sum()
        apart = (torch.cat(alone(model, samples)) * weights).sum()
        for one, other in zip(
            torch.autograd.grad(packed, wanted_of), torch.autograd.grad(apart, wanted_of), strict=True
        ):
            # norms run in float32, whatever the dtype
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [None, "20KB"])
@torch.no_grad()
def test_saved_is_loaded(model, kind, samples, shards, tmp_path):
    model.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards is not None)
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    # in a file weights lie at odd addresses, where vectorised sums begin elsewhere and may differ in the last bit
    loaded = copy.deepcopy(loaded)
    if kind == "gemma3_text":
        # the scale of its embeddings is no weight: a float32 number in a model that was made in float32 and then moved
        mine, theirs = (each.get_input_embeddings().embed_scale for each in (model, loaded))
        assert torch.equal(mine.float(), theirs.float())
        theirs.copy_(mine)
    assert torch.equal(loaded(**samples[0].inputs()).logits, model(**samples[0].inputs()).logits)


@torch.no_grad()
def test_the_folded_projection_is_each_blocks_norm_then_its_projections(kind):
    model = tiny_casa_over(kind)
    decoder, image = model.decoder, torch.randn(7, 32, dtype=torch.float64)
    sources = [model.casa_layers[str(index)] for index in range(3)]
    norms = [decoder.image_norm(index) for index in range(3)]
    pairs = project_images(image, sources, norms)
    for block, source, norm, (key, value) in zip(decoder.blocks, sources, norms, pairs, strict=True):
        normed = block.input_layernorm(image)
        if kind in MULTIPLY_IN_FLOAT32:
            exact = rms_norm(image, norm.eps) * norm.gain
            torch.testing.assert_close(exact, normed, rtol=1e-6, atol=1e-6)
            normed = exact
        wanted = source.k_proj(normed).view(7, 2, 8)
        wanted = source.k_norm(wanted) if hasattr(source, "k_norm") else wanted
        torch.testing.assert_close(key, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(value.flatten(1), source.v_proj(normed), rtol=0, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_beams_are_the_same_batched_and_alone(kind, samples):
    model = tiny_casa_over(kind)
    pair = [samples[0], replace(samples[2], ids=samples[2].ids[:3], pictures=samples[2].pictures[:2])]
    how = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(**as_batch(pair), **how)
    for row, sample in zip(together, pair, strict=True):
        single = model.generate(**sample.inputs(), **how)
        assert row[-4:].tolist() == single[0, len(sample.ids) :].tolist()


@pytest.mark.parametrize("kind", VLM_BACKBONES)
def test_a_vlm_comes_frozen_but_for_fusion_and_the_last_tower_blocks(kind):
    model = adapt(tiny_backbone(kind))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        name.startswith("casa_layers.") or ".visual.blocks." in name or ".encoder.layers." in name for name in trained
    )
    assert any(name.startswith("casa_layers.") for name in trained)
    assert any("blocks" in name or "encoder.layers" in name for name in trained)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any("patch_embed" in name or "embeddings" in name for name in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_path_will_do(kind, tmp_path):
    backbone = tiny_backbone(kind)
    backbone.save_pretrained(tmp_path)
    vision = tiny_encoder() if kind in TEXT_BACKBONES else None
    model = adapt(str(tmp_path), vision=vision)
    state = model.state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(state[f"backbone.{name}"].double(), tensor), name


def test_an_unknown_decoder_is_refused_with_the_reason():
    from transformers import GPT2Config

    backbone = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(UserError, match=r"'gpt2' is not a model that casa knows.*adding-a-backbone"):
        adapt(backbone, vision=tiny_encoder())


def test_a_vlm_takes_no_second_tower():
    with pytest.raises(UserError, match="image encoder of its own"):
        adapt(tiny_backbone("qwen2_5_vl"), vision=tiny_encoder())


def test_copies_are_independent(kind, samples):
    model = tiny_casa_over(kind)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**samples[0].inputs()).logits
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(**samples[0].inputs()).logits, before)


def test_auto_classes_know_the_parts():
    for kind in VLM_BACKBONES:
        assert type(tiny_backbone(kind).config) in AutoModelForImageTextToText._model_mapping


@pytest.mark.slow
@torch.no_grad()
def test_sampled_rows_are_the_same_batched_and_alone(model, samples, monkeypatch):
    """Each row draws from a generator of its own; a batch that changes a row's probabilities would change its words.

    A seed made of the probabilities themselves would be another one where they are rounded to another float32.
    """
    how = {"max_new_tokens": 5, "do_sample": True, "temperature": 1.3, "top_k": 20, "eos_token_id": None}

    def drawn(rows, inputs):
        generators = [torch.Generator().manual_seed(row) for row in rows]

        def by_row(weights, num_samples, **_):
            pairs = zip(weights, generators, strict=True)
            places = [torch.rand(num_samples, generator=generator, dtype=weights.dtype) for _, generator in pairs]
            found = torch.searchsorted(weights.cumsum(1), torch.stack(places))
            return found.clamp(max=weights.shape[-1] - 1)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "multinomial", by_row)
            return model.generate(**inputs, **how, pad_token_id=0)[:, -5:].tolist()

    together = drawn(range(len(samples)), as_batch(samples))
    assert together == [drawn([row], sample.inputs())[0] for row, sample in enumerate(samples)]
    greedy = [
        model.generate(**sample.inputs(), **how | {"do_sample": False, "temperature": None, "top_k": None})
        for sample in samples
    ]
    assert together != [row[0, -5:].tolist() for row in greedy], "they were drawn"


@pytest.mark.slow
@torch.no_grad()
def test_a_fixed_seed_repeats_a_batch(model, samples):
    how = {"max_new_tokens": 5, "do_sample": True, "top_k": 20, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for cached, seed in ((True, 5), (False, 5), (True, 6)):
        torch.manual_seed(seed)
        found.append(model.generate(**as_batch(samples), use_cache=cached, **how))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
