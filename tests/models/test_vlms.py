"""Insertion VLMs: under `method="insertion"` they are their own forward; under CASA their positions are mRoPE's."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from casa import FusionConfig, adapt
from casa.layers import PackedStep, plan_call, project_images
from casa.testing import TinySample, as_batch, tiny_backbone, tiny_casa_over, tiny_images
from casa.testing.drawn import SEVERAL, texts

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE = 58
# pictures with text between them (the VLMs count two side by side as one), none of them square
SAMPLES = (
    TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=10),
    TinySample((40, 6, 13, 22, 50), ((0, 3, 2), (3, 3, 1)), seed=30),
    TinySample((7, 30, 11), (), seed=20),
)


def with_placeholders(sample):
    """Ids with one placeholder per image token, as the VLM's own processor writes them; where text stands in them."""
    ids, places = [], []
    for index in range(len(sample.ids) + 1):
        for place, rows, columns in sample.pictures:
            if place == index:
                ids += [IMAGE] * (rows * columns)
        if index < len(sample.ids):
            places.append(len(ids))
            ids.append(sample.ids[index])
    return ids, places


def own_forward(backbone, samples):
    """Logits of the VLM itself, (rows of) text positions only."""
    rows = [with_placeholders(sample) for sample in samples]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[0] * (length - len(ids)) + ids for ids, _ in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    pixels = {k: v for k, v in as_batch(samples).items() if k in ("pixel_values", "image_grid_thw")}
    positions, _ = backbone.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], pixels.get("image_grid_thw"), attention_mask=inputs["attention_mask"]
    )
    logits = backbone(**inputs, **pixels, position_ids=positions).logits
    return [row[[length - len(ids) + p for p in places]] for row, (ids, places) in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("kind", QWENS)
@torch.no_grad()
def test_insertion_is_the_vlms_own_forward(kind):
    wanted = own_forward(tiny_backbone(kind), SAMPLES)
    model = adapt(tiny_backbone(kind), FusionConfig(method="insertion")).eval()
    logits = model(**as_batch(SAMPLES)).logits
    for row, sample, own in zip(logits, SAMPLES, wanted, strict=True):
        torch.testing.assert_close(row[-len(sample.ids) :], own, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module", params=QWENS)
def twins(request):
    """A VLM, and one with the same weights that was adapted."""
    model = adapt(tiny_backbone(request.param), FusionConfig(method="insertion"))
    return tiny_backbone(request.param), model.eval().requires_grad_(True)


@pytest.mark.slow
@SEVERAL
@given(rows=st.lists(texts(apart=True), min_size=1, max_size=3))
def test_insertion_is_the_vlms_own_forward_for_any_texts_and_pictures(twins, rows):
    """The gradients of its weights too."""
    vlm, model = twins
    wanted = torch.cat(own_forward(vlm, rows))
    logits = model(**as_batch(rows)).logits
    found = torch.cat([row[-len(sample.ids) :] for row, sample in zip(logits, rows, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    weights = dict(vlm.named_parameters())
    mine = {name: model.backbone.get_parameter(name) for name in weights}
    for name, ours, theirs in zip(weights, gradients(found, mine), gradients(wanted, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda words, name=name: f"{name}: {words}")


def gradients(outcome, leaves):
    """Of all leaves, for a loss in which each number of the outcome counts differently."""
    upstream = torch.randn(outcome.shape, generator=torch.Generator().manual_seed(0), dtype=outcome.dtype)
    return torch.autograd.grad(outcome, list(leaves.values()), upstream, materialize_grads=True)


@pytest.mark.parametrize("kind", QWENS)
@torch.no_grad()
def test_insertion_goes_on_where_the_vlm_would(kind):
    sample = SAMPLES[0]
    wanted = own_forward(tiny_backbone(kind), [sample])[0]
    model = adapt(tiny_backbone(kind), FusionConfig(method="insertion")).eval()
    for cuts in ([4], [2, 3, 5, 6]):
        cache, found = None, []
        for call in sample.calls(cuts):
            output = model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
        torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_insertion_over_smolvlm_is_its_own_forward():
    ids = [5, 9, 17, 4, 33, 8]
    tiles = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    backbone = tiny_backbone("smolvlm")
    marked = ids[:2] + [IMAGE] * 4 + ids[2:5] + [IMAGE] * 4 + ids[5:]
    own = backbone(input_ids=torch.tensor([marked]), pixel_values=tiles[None]).logits[0]
    text = [i for i, token in enumerate(marked) if token != IMAGE]
    model = adapt(tiny_backbone("smolvlm"), FusionConfig(method="insertion")).eval()
    found = model(
        input_ids=torch.tensor([ids]),
        pixel_values=tiles,
        image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
        image_positions=torch.tensor([[0, 2], [0, 5]]),
    ).logits[0]
    torch.testing.assert_close(found, own[text], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_casa_over_smolvlm_sees_its_tiles_and_pieces_are_one_pass():
    model = tiny_casa_over("smolvlm")
    tiles = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.tensor([[5, 9, 17, 4, 33, 8]])
    grid = torch.tensor([[1, 4, 4]] * 2)
    places = torch.tensor([[0, 2], [0, 5]])
    whole = model(input_ids=ids, pixel_values=tiles, image_grid_thw=grid, image_positions=places).logits
    first = model(
        input_ids=ids[:, :3],
        pixel_values=tiles[:1],
        image_grid_thw=grid[:1],
        image_positions=places[:1],
        use_cache=True,
    )
    second = model(
        input_ids=ids[:, 3:],
        pixel_values=tiles[1:],
        image_grid_thw=grid[1:],
        image_positions=torch.tensor([[0, 2]]),
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-10, atol=1e-10)
    assert first.past_key_values.image_tokens == 4
    other = model(input_ids=ids, pixel_values=tiles + 1, image_grid_thw=grid, image_positions=places).logits
    assert float((other - whole).abs().max()) > 1e-4


def insertion_attention(model, image, text, positions):
    """What block 0's own self-attention gives [image; text] in one causal stream, at text positions."""
    decoder = model.decoder
    block = decoder.blocks[0]
    stream = block.input_layernorm(torch.cat([image, text]))[None]
    factors = decoder.stack.rotary_emb(stream, positions)
    out, _ = block.self_attn(hidden_states=stream, position_embeddings=factors, attention_mask=None)
    return out[0, len(image) :]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "helium"])
def of_kind(request):
    return request.param, tiny_casa_over(request.param)


@SEVERAL
@given(grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), count=st.integers(1, 8), seed=st.integers(0, 99))
def test_block_0_gives_text_what_insertions_block_0_gives_it(of_kind, grid, count, seed):
    """With the rotary positions that insertion would use: text behind the image's longer side, or all its tokens.

    The gradients too: of image, text, the norm before both, and every weight of the layer, a copy of the block's.
    """
    kind, model = of_kind
    decoder, (rows, columns), tokens = model.decoder, grid, grid[0] * grid[1]
    assume(tokens != count)  # by their number, positions of the image and of text are told apart
    drawn = torch.randn(tokens + count, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    image, text = (part.clone().requires_grad_() for part in drawn.split([tokens, count]))
    rotary = decoder.rotaries([0], torch.device("cpu"), torch.float64)[0]
    if decoder.rotary_axes == 3:
        places = torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)])
        image_at = torch.cat([torch.zeros(1, tokens, dtype=torch.int64), places])
        ahead = max(rows, columns)
        at = torch.cat([image_at, ahead + torch.arange(count).expand(3, -1)], dim=1)[:, None]
    else:
        places, image_at, ahead = None, torch.arange(tokens), tokens
        at = torch.arange(tokens + count)[None]
    layer, block = model.casa_layers["0"], decoder.blocks[0]
    plan = plan_call(torch.ones(1, count, dtype=torch.bool), [(0, 0)], [tokens])
    key, value = project_images(image, [layer], [decoder.image_norm(0)])[0]

    def behind(positions):
        # keys come turned already; asked for the image's place, it leaves them
        return rotary(torch.zeros_like(positions)) if positions.shape[-1] == tokens else rotary(positions + ahead)

    step = PackedStep(plan, [(rotary(image_at)(key), value)], [behind], places)
    found = layer(block.input_layernorm(text)[None], step, 0)[0]
    wanted = insertion_attention(model, image, text, at)
    # Helium multiplies its norm's gain in float32
    worst = 1e-6 if kind == "helium" else 1e-12
    torch.testing.assert_close(found, wanted, rtol=0, atol=worst)
    shared = {"image": image, "text": text, "gain": block.input_layernorm.weight}
    copied = dict(layer.named_parameters())
    theirs = {name: block.self_attn.get_parameter(name) for name in copied}
    for mine, own in zip(gradients(found, shared | copied), gradients(wanted, shared | theirs), strict=True):
        torch.testing.assert_close(mine, own, rtol=10 * worst, atol=10 * worst)


@torch.no_grad()
def test_a_tokens_row_and_column_reach_its_key():
    """Under mRoPE two image tokens with the same content differ by where they stand; text turns alike on all axes."""
    model = tiny_casa_over("qwen2_5_vl")
    decoder = model.decoder
    rotary = decoder.rotaries([0], torch.device("cpu"), torch.float64)[0]
    flat = rotary(torch.tensor([4]))
    three = rotary(torch.tensor([[4], [4], [4]]))
    assert torch.equal(flat.cos, three.cos)
    assert not torch.equal(rotary(torch.tensor([[4], [5], [4]])).cos, flat.cos)
    assert not torch.equal(rotary(torch.tensor([[4], [4], [6]])).cos, flat.cos)
    # a picture of one row and the same tokens as one column are not the same picture
    sample = TinySample((5, 9, 17), ((1, 1, 4),))
    pixels = tiny_images([(1, 4)], 3)
    features = model.encode_images(**pixels)
    inputs = {"input_ids": torch.tensor([sample.ids]), "image_positions": torch.tensor([[0, 1]])}
    row = model(**inputs, image_features=features, image_grid_thw=torch.tensor([[1, 2, 8]])).logits
    column = model(**inputs, image_features=features, image_grid_thw=torch.tensor([[1, 8, 2]])).logits
    assert float((row - column).abs().max()) > 1e-6


@torch.no_grad()
def test_deep_stack_features_reach_the_layers_below_which_they_join():
    model = tiny_casa_over("qwen3_vl")
    sample = SAMPLES[0]
    inputs = sample.inputs()
    features = model.encode_images(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    assert features.shape[1] == 3 * 32
    before = model(**inputs, image_features=features).logits
    for level in range(3):
        changed = features.clone()
        changed[:, level * 32 : (level + 1) * 32] += 1.0
        assert float((model(**inputs, image_features=changed).logits - before).abs().max()) > 1e-5, level
    only_first = tiny_casa_over("qwen3_vl", layers=[0])
    before = only_first(**inputs, image_features=features).logits
    changed = features.clone()
    changed[:, 32:] += 1.0
    assert torch.equal(only_first(**inputs, image_features=changed).logits, before)
