"""Tokens by the prepared way are those that go through the modules; what has to go there is told and noticed."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from casa import FusionConfig, adapt
from casa.analysis.ablations import ablated
from casa.models import decoding, passes
from casa.models.decoding import Matrix, PreparedDecoder, prepared
from casa.testing import BACKBONES, TinySample, as_batch, tiny_backbone, tiny_casa, tiny_casa_over, tiny_encoder
from tests.few import few_first
from tests.models.conftest import FEW, FUSIONS

PREPARED = sorted(set(BACKBONES) - {"gemma3_text"})
PROMPT = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=10)
ROWS = (PROMPT, TinySample((7, 30, 11, 12)), TinySample((40, 6, 13), ((0, 2, 2),), seed=30))
TINY_TEXT: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TINY_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
NEXT = ([3, 44, 9], [50, 8, 8], [27, 19, 31], [6, 6, 55])


@pytest.fixture
def ways(monkeypatch):
    """How many tokens went by the prepared way."""
    taken = []
    through = PreparedDecoder.__call__

    def count(self, *args):
        taken.append(1)
        return through(self, *args)

    monkeypatch.setattr(PreparedDecoder, "__call__", count)
    return taken


def why(model):
    """The refusal of a model, None if it is prepared."""
    layers = model.fusion_layers
    return prepared(layers.decoder, layers.config, layers.blocks, layers.layers).refusal


@torch.no_grad()
def decoded(model, inputs, steps=NEXT, grad=False):
    """Logits of tokens fed one by one behind a prompt, by row, and the cache."""
    with torch.set_grad_enabled(grad):
        output = model(**inputs, use_cache=True)
        cache, found = output.past_key_values, []
        for ids in steps:
            rows = cache.num_rows
            output = model(input_ids=torch.tensor(ids[:rows])[:, None], past_key_values=cache, use_cache=True)
            found.append(output.logits.detach())
    return torch.cat(found, dim=1), cache


def both_ways(model, inputs, ways, monkeypatch):
    quick, cache = decoded(model, inputs)
    assert len(ways) == len(NEXT)
    with monkeypatch.context() as patched:
        patched.setattr(PreparedDecoder, "refusal", "not now", raising=False)
        patched.setattr(decoding, "refusal", lambda *_: "not now")
        decoding._prepared.clear()
        slow, other = decoded(model, inputs)
    decoding._prepared.clear()
    assert len(ways) == len(NEXT)
    torch.testing.assert_close(quick, slow, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(tensors(cache), tensors(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def tensors(cache):
    held = [t for layer in cache.text.layers if layer.is_initialized for t in (layer.keys, layer.values)]
    if (state := cache.windows) is not None:
        text = state.text_tokens
        for layer in state.layers:
            for row, count in enumerate(text):
                stop = layer.images + (count if layer.capacity else 0)
                held += [layer.key[row, :, layer.images : stop], layer.value[row, :, layer.images : stop]]
    return held


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize(
    "fusion",
    few_first([{}, {"placement": "before"}, {"placement": "replace", "every": 2}, {"method": "insertion"}], [{}]),
    ids=str,
)
def test_families_and_placements(kind, fusion, ways, monkeypatch):
    sample = PROMPT.in_squares() if kind == "smolvlm" else PROMPT
    both_ways(tiny_casa_over(kind, **fusion), sample.inputs(), ways, monkeypatch)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("rows", [1, 3, decoding.FEW + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_whichever_product_is_faster_is_the_same(monkeypatch, slow, rows, bias):
    monkeypatch.setattr(decoding, "linear_is_slow", lambda dtype, several: slow)
    random = torch.Generator().manual_seed(rows)
    linear = nn.Linear(12, 7, bias=bias).double()
    x, residual = (torch.randn(rows, width, generator=random).double() for width in (12, 7))
    with torch.no_grad():
        found, added = Matrix(linear)(x), Matrix(linear)(x, residual.clone())
        torch.testing.assert_close(found, linear(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(added, linear(x) + residual, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()


@pytest.mark.parametrize("several", [False, True])
def test_what_is_faster_here_is_measured_once(several):
    decoding.linear_is_slow.cache_clear()
    assert decoding.linear_is_slow(torch.bfloat16, several) in (False, True)
    assert decoding.linear_is_slow.cache_info().currsize == 1
    assert decoding.linear_is_slow(torch.float64, several) is True


@pytest.mark.parametrize("inputs", [PROMPT.inputs(), as_batch(ROWS), as_batch(ROWS[1:2])], ids=["one", "rows", "text"])
def test_variants(fusion, inputs, ways, monkeypatch):
    both_ways(tiny_casa(**fusion), inputs, ways, monkeypatch)


@pytest.fixture(params=few_first([name for name in FUSIONS if name != "replace first"], FEW))
def fusion(request):
    return FUSIONS[request.param]


def test_nothing_is_held_twice_and_weights_keep_their_values():
    model = tiny_casa()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = sum(p.numel() for p in model.parameters())
    decoded(model, PROMPT.inputs())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 8 * held
    assert all(not p.is_inference() and p.is_leaf for p in model.parameters())


def test_a_prepared_model_is_saved_and_copied_as_any_other(tmp_path):
    model = tiny_casa()
    wanted, _ = decoded(model, PROMPT.inputs())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(decoded(type(model).from_pretrained(tmp_path), PROMPT.inputs())[0], wanted)
    torch.testing.assert_close(decoded(copy.deepcopy(model), PROMPT.inputs())[0], wanted)


def test_it_trains_on_and_decodes_with_what_it_has_learnt(ways):
    model = tiny_casa()
    decoded(model, PROMPT.inputs())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, _ = decoded(model, PROMPT.inputs())
    model(**PROMPT.inputs(), labels=PROMPT.inputs()["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    ways.clear()
    found, _ = decoded(model, PROMPT.inputs())
    assert len(ways) == len(NEXT)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, decoded(model, PROMPT.inputs(), grad=True)[0])


def changed_data(model):
    weight = model.decoder.blocks[1].self_attn.q_proj.weight
    weight.data = weight.data * 2


def changed_parameter(model):
    linear = model.decoder.blocks[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def changed_module(model):
    block = model.decoder.blocks[0]
    block.mlp.down_proj = copy.deepcopy(block.mlp.down_proj).requires_grad_(False)
    block.mlp.down_proj.weight.mul_(2)


def changed_assigned(model):
    state = {name: value * 1.5 for name, value in model.casa_layers.state_dict().items()}
    model.casa_layers.load_state_dict(state, assign=True)


def changed_dtype(model):
    model.float().double()


@pytest.mark.parametrize("change", [changed_data, changed_parameter, changed_module, changed_assigned, changed_dtype])
def test_what_takes_a_weights_place_is_noticed(change, ways):
    model = tiny_casa().requires_grad_(False)
    decoded(model, PROMPT.inputs())
    change(model)
    ways.clear()
    found, _ = decoded(model, PROMPT.inputs())
    assert len(ways) == len(NEXT)
    torch.testing.assert_close(found, decoded(model, PROMPT.inputs(), grad=True)[0])


def a_hook(model):
    return model.decoder.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 0)


def a_hook_on_a_layer(model):
    return model.casa_layers["2"].o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def a_forward(model):
    norm = model.decoder.blocks[1].input_layernorm
    norm.forward = lambda x: x * 0


def lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], init_lora_weights=False), model)


def compiled(model):
    block = model.decoder.blocks[1]
    block._compiled_call_impl = partial(block._call_impl)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (a_hook, "something is hooked to a LlamaMLP"),
        (a_hook_on_a_layer, "something is hooked to a Linear"),
        (a_forward, "a LlamaRMSNorm has a forward of its own"),
        (lora, "v_proj is more than its weight: a Linear"),
        (compiled, "a LlamaDecoderLayer has a forward of its own"),
    ],
)
def test_what_modules_do_besides_is_done(change, words, ways):
    model = tiny_casa().requires_grad_(False)
    decoded(model, PROMPT.inputs())
    ways.clear()
    handle = change(model)
    found, _ = decoded(model, PROMPT.inputs())
    assert not ways
    assert words in why(model)
    torch.testing.assert_close(found, decoded(model, PROMPT.inputs(), grad=True)[0])
    if handle is not None:
        handle.remove()
        decoded(model, PROMPT.inputs())
        assert ways


def test_other_families_other_attention_and_training_go_through_the_modules(ways):
    assert why(tiny_casa_over("gemma3_text")) == "Gemma3DecoderLayer is not known"
    text = tiny_backbone("llama")
    text.set_attn_implementation("eager")
    assert why(adapt(text, FusionConfig(), tiny_encoder())) == "attention goes another way than through torch"
    mixed = tiny_casa()
    mixed.casa_layers["0"].float()
    assert why(mixed) == "weights differ in dtype or device"
    model = tiny_casa()
    with ablated(model, "no-self-attention"):
        decoded(model, PROMPT.inputs())
    decoded(model, PROMPT.inputs(), grad=True)
    decoded(model.train(), PROMPT.inputs())
    assert not ways


def test_autocast_sliding_windows_and_records_go_through_the_modules(ways):
    model, inputs = tiny_casa(dtype=torch.float32), PROMPT.inputs()
    wanted, _ = decoded(model, inputs)
    ways.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = decoded(model, inputs)
    assert not ways
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
    sliding = adapt(
        transformers.MistralForCausalLM(transformers.MistralConfig(**TINY_TEXT, sliding_window=4)).double(),
        FusionConfig(),
        tiny_encoder(),
    ).eval()
    assert why(sliding) is None
    found, cache = decoded(sliding, inputs)
    assert cache.slides
    torch.testing.assert_close(found, decoded(sliding, inputs, grad=True)[0])
    _, cache = decoded(model, inputs)
    seen = []
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, record=lambda *args: seen.append(args[0]))
    assert not ways[len(NEXT) :]
    assert seen == [0, 1, 2]


class Batched(TorchDispatchMode):
    """Notices the shapes of what is multiplied batch by batch."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.shapes.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("inputs", [PROMPT.inputs(), {"input_ids": torch.tensor([[5, 9, 17]])}], ids=["image", "text"])
def test_the_last_token_of_a_prompt_does_not_copy_the_head(inputs):
    """torch copies a frozen matrix that it multiplies as one of a batch of one: 56 MB for SmolLM2's head."""
    model = tiny_casa().requires_grad_(False)
    wanted = model(**inputs).logits[:, -1:]
    with Batched() as seen:
        found = model(**inputs, logits_to_keep=1).logits
    assert (1, 32, 61) not in seen.shapes
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_shared_weights_project_once(monkeypatch):
    """A token of a model whose fusion layers borrow (D1) costs as many products as one of the backbone alone."""
    products = []
    multiplied = decoding.Matrix.__call__
    monkeypatch.setattr(
        decoding.Matrix, "__call__", lambda self, *args: (products.append(1), multiplied(self, *args))[1]
    )
    cases: list[tuple[dict[str, Any], int]] = [({"share_weights": True}, 1), ({}, 1)]
    cases += [({"share_weights": True, "placement": "before"}, 2)]
    for fusion, more in cases:
        model, frames = tiny_casa(**fusion), PROMPT.inputs()
        text = {"input_ids": frames["input_ids"]}
        counts = []
        for inputs in (text, frames):
            products.clear()
            decoded(model, inputs, NEXT[:1])
            counts.append(len(products))
        # o_proj of the fusion layer beside; before it, its own queries, keys and values too
        assert counts[1] - counts[0] == more * len(model.fused_blocks), fusion


def test_beams_and_attentions(ways):
    model = tiny_casa()
    inputs = PROMPT.inputs()
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    beams = model.generate(**inputs, num_beams=3, **asked)
    assert ways
    ways.clear()
    told = model.generate(**inputs, num_beams=3, output_attentions=True, return_dict_in_generate=True, **asked)
    assert torch.equal(told.sequences, beams)
    assert len(told.attentions) > 1
    assert not ways


def test_a_model_made_in_inference_mode_decodes_there(ways):
    with torch.inference_mode():
        model = tiny_casa()
        found, _ = decoded(model, PROMPT.inputs())
        assert ways
        # the modules run on with what was joined
        torch.testing.assert_close(model(**PROMPT.inputs()).logits[:, -1:].shape, found[:, :1].shape)


@pytest.mark.parametrize(
    "fusion", [{}, {"placement": "before"}, {"history": 1}, {"gate": "tanh"}, {"method": "insertion"}], ids=str
)
def test_a_frame_behind_a_token_goes_the_same_way(fusion, ways):
    """The call of a live session: the last token, the next frame, its delimiter; and a question in several tokens."""
    model = tiny_casa(**fusion)
    rows = as_batch(ROWS)
    frame = TinySample((3, 6), ((1, 2, 2),), seed=50).inputs()
    many = {name: torch.cat([value] * 3) for name, value in frame.items()}
    many["image_positions"] = torch.tensor([[row, 1] for row in range(3)])
    calls = [many, {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])}]

    def fed(grad):
        found, cache = [], None
        with torch.set_grad_enabled(grad):
            for call in (rows, *calls):
                output = model(**call, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits.detach())
        return torch.cat(found[1:], dim=1)

    quick = fed(False)
    # an inserted image goes through the modules, and the question behind it does not
    assert len(ways) == (1 if fusion.get("method") else 2)
    torch.testing.assert_close(quick, fed(True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "fusion",
    [{}, {"placement": "before"}, {"placement": "replace", "every": 2}, {"method": "cross_attention"}],
    ids=str,
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_frame_is_seen_as_one_pass_sees_it(kind, fusion, at, monkeypatch):
    """Frames of live sessions, and questions about them, write into the windows; a packed pass says the same."""
    model, taken = tiny_casa_over(kind, **fusion), []
    frame_step = passes.FusionLayers._frame_step

    def noted(*args):
        found = frame_step(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(passes.FusionLayers, "_frame_step", noted)
    # what is seen of the first frames differs in length, and so does the text behind them
    cases = as_batch((ROWS[0], ROWS[2]))
    frame = TinySample((3, 6, 8), ((at, 2, 2), (at, 1, 2)), seed=50).inputs()
    frames = {name: torch.cat([value] * 2) for name, value in frame.items()}
    frames["image_positions"] = torch.tensor([[row, at] for row in (0, 0, 1, 1)])
    asked = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}

    def fed(grad):
        found, cache = [], None
        with torch.set_grad_enabled(grad):
            for call in (cases, frames, asked, frames):
                output = model(**call, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits.detach())
        return torch.cat(found[1:], dim=1), cache

    quick, cache = fed(False)
    assert taken == [False, True, True]
    slow, other = fed(True)
    torch.testing.assert_close(quick, slow, rtol=1e-12, atol=1e-12)
    assert cache.windows.windows == other.windows.windows
    for mine, theirs in zip(tensors(cache), tensors(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
