"""Text models whose blocks, some or all, see a sliding window of three tokens: masks and caches of both kinds."""

import pytest
import torch

from casa import FusionConfig, adapt
from casa.testing import TinySample, as_batch, as_packed, tiny_backbone, tiny_encoder
from casa.testing.tiny import spread

LOCAL, GLOBAL = "sliding_attention", "full_attention"
# config changes, and the blocks that are local
KINDS = {
    "mistral": ("mistral", {"sliding_window": 3}, {0, 1, 2}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": [GLOBAL, LOCAL, LOCAL]},
        {1, 2},
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 3}, {0, 2}),
}
FUSIONS = {
    "parallel": {},
    "before": {"placement": "before"},
    "history": {"history": 1},
    "cross": {"method": "cross_attention"},
    "insertion": {"method": "insertion"},
    # the first local block, the only global one, all local ones: caches that stay empty
    "replace 0": {"placement": "replace", "layers": (0,)},
    "replace 1": {"placement": "replace", "layers": (1,)},
    "replace 0, 2": {"placement": "replace", "layers": (0, 2)},
}
SAMPLES = (
    TinySample((5, 9, 17, 4, 33, 8, 21, 40, 41, 42), ((2, 2, 3), (7, 1, 2)), seed=10),
    TinySample((7, 30, 11, 12), (), seed=20),
    TinySample((40, 6, 13, 22, 50, 51, 52, 53), ((0, 2, 2), (0, 1, 1), (5, 3, 1)), seed=30),
)


def backbone_of(kind):
    name, changes, local = KINDS[kind]
    config = tiny_backbone(name).config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = spread(type(tiny_backbone(name))(config)).double().eval()
    types = getattr(config, "layer_types", None) or [LOCAL] * 3
    assert {index for index, found in enumerate(types) if found == LOCAL} == local
    return model


def casa_of(kind, fusion):
    model = adapt(backbone_of(kind), FusionConfig(**FUSIONS[fusion]), vision=tiny_encoder()).eval()
    torch.manual_seed(2)
    spread(model.projector)
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=FUSIONS)
def model(kind, request):
    return casa_of(kind, request.param)


def in_calls(model, calls):
    cache, found = None, []
    for call in calls:
        output = model(**call, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [name for name in FUSIONS if "replace" not in name])
@torch.no_grad()
def test_text_alone_is_the_backbone_bit_for_bit(kind, fusion):
    ids = torch.tensor([SAMPLES[0].ids])
    wanted = backbone_of(kind)(input_ids=ids).logits
    assert torch.equal(casa_of(kind, fusion)(input_ids=ids).logits, wanted)


@torch.no_grad()
def test_a_sliding_window_is_felt(kind):
    """Else all below would show nothing: a block that saw the whole text would answer otherwise."""
    model, ids = backbone_of(kind), torch.tensor([SAMPLES[0].ids])
    wanted = model(input_ids=ids).logits
    config = model.config
    config.sliding_window = 64
    wide = type(model)(config).double().eval()
    wide.load_state_dict(model.state_dict())
    moved = (wide(input_ids=ids).logits - wanted)[0].abs().amax(-1)
    assert float(moved[:3].max()) < 1e-12
    assert float(moved[3:].min()) > 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_packed_batched_and_pieces_are_each_sample_alone(model, close):
    wanted = [model(**sample.inputs()).logits[0] for sample in SAMPLES]
    close(model(**as_packed(SAMPLES)).logits[0], torch.cat(wanted))
    for row, sample, one in zip(model(**as_batch(SAMPLES)).logits, SAMPLES, wanted, strict=True):
        close(row[-len(sample.ids) :], one)
    for sample, one in zip(SAMPLES, wanted, strict=True):
        for cuts in (range(1, len(sample.ids)), [2], [3], [1, 3]):
            close(in_calls(model, sample.calls(cuts)), one)


@pytest.mark.slow
def test_generation_is_the_same_cached_or_not(model):
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for inputs in (as_batch(SAMPLES), SAMPLES[0].inputs()):
        for beams in (1, 2):
            found = [model.generate(**inputs, num_beams=beams, use_cache=cached, **how) for cached in (True, False)]
            assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "insertion"])
def test_drafts_are_taken_back_from_a_cache_that_slides(kind, fusion):
    model = casa_of(kind, fusion)
    echo = TinySample((5, 9, 17, 4, 5, 9, 17, 4, 5, 9), ((2, 2, 3), (6, 1, 2)), seed=14)
    how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(**echo.inputs(), **how)
    assert torch.equal(model.generate(**echo.inputs(), **how, prompt_lookup_num_tokens=3), wanted)
