"""Packed rows are attended to along the diagonal: the same outputs and gradients, and nothing between samples."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from casa.models import fusion
from casa.models.fusion import SPAN, spans_of
from casa.testing import tiny_casa, tiny_casa_over


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 2 * SPAN), min_size=1, max_size=12))
def test_spans_hold_whole_samples(lengths):
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    spans = spans_of(starts, sum(lengths))
    if spans is None:
        assert sum(lengths) <= SPAN or len(lengths) == 1
        return
    assert sum(spans) == sum(lengths)
    bounds = {sum(spans[:number]) for number in range(len(spans))}
    assert bounds <= set(starts)
    assert all(span <= SPAN or span in lengths for span in spans)
    # as many neighbours as fit: the next one would not have
    firsts = [samples[0] for samples in samples_of(spans, lengths)]
    assert all(span + first > SPAN for span, first in zip(spans, firsts[1:], strict=False))


def samples_of(spans, lengths):
    """Lengths of the samples of each span."""
    left, found = list(lengths), []
    for span in spans:
        found.append([])
        while sum(found[-1]) < span:
            found[-1].append(left.pop(0))
    return found


def test_padding_in_front_is_no_sample():
    assert spans_of([3, SPAN], 2 * SPAN) == (SPAN, SPAN)
    assert spans_of([3], SPAN) is None


def packed_gradients(model, lengths):
    torch.manual_seed(1)
    model.zero_grad()
    ids = torch.randint(4, 60, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_it_is_the_attention_of_the_whole_row(monkeypatch, method):
    model = tiny_casa(method=method)
    lengths, scores = [3, 7, 2, 9, 4], []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, *args, **kwargs):
        scores.append(query.shape[-2] * key.shape[-2])
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    whole_loss, whole = packed_gradients(model, lengths)
    dense = sum(scores)
    scores.clear()
    monkeypatch.setattr(fusion, "SPAN", 10)
    loss, parts = packed_gradients(model, lengths)
    assert sum(scores) * 625 == dense * (10**2 + 2**2 + 9**2 + 4**2)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-9, atol=1e-13), name


def test_only_models_that_attend_through_torch_take_this_way(monkeypatch):
    monkeypatch.setattr(fusion, "SPAN", 4)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model, eager = tiny_casa(), tiny_casa()
    eager.set_attn_implementation("eager")
    for each in (model, eager):
        packed_gradients(each, [3, 3, 3])
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert eager.config.get_text_config()._attn_implementation == "eager"
    # what other models attend by is transformers' own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "casa_diagonal" not in model.config.to_json_string()
    assert tiny_casa().config.get_text_config()._attn_implementation == "sdpa"


def parts(config):
    """What a config and those inside it say, with what they do not write down."""
    return {
        name: (config.to_dict(), config._attn_implementation)
        for name, config in {"": config, **{n: getattr(config, n) for n in config.sub_configs}}.items()
        if config is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl", "gemma3_text"])
@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_a_pass_leaves_the_config_as_it_was_even_if_it_fails(monkeypatch, kind, method):
    monkeypatch.setattr(fusion, "SPAN", 4)
    model = tiny_casa_over(kind, method=method)
    before = copy.deepcopy(parts(model.config))
    packed_gradients(model, [3, 3, 3])
    assert parts(model.config) == before
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    packed_gradients(model, [3, 3, 3])
    assert parts(model.config) == before
    seen = []

    def fail(*_):
        seen.append(model.decoder.config._attn_implementation)
        raise RuntimeError("out of memory")

    model.decoder.attention(1).o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        packed_gradients(model, [3, 3, 3])
    assert seen == [fusion.NAME]
    assert parts(model.config) == before


def test_a_checkpointed_block_is_computed_again_along_the_diagonal(monkeypatch):
    monkeypatch.setattr(fusion, "SPAN", 4)
    model = tiny_casa().train()
    plain_loss, plain = packed_gradients(model, [3, 3, 3])
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    loss, again = packed_gradients(model, [3, 3, 3])
    assert loss == plain_loss
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


def test_afterwards_the_model_generates_as_before(monkeypatch):
    monkeypatch.setattr(fusion, "SPAN", 4)
    model = tiny_casa().eval()
    ids = torch.randint(4, 60, (2, 5))
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    packed_gradients(model, [3, 3, 3])
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
