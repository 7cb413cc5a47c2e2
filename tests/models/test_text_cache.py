"""The text model's cache gives what transformers' own gives, and copies only new tokens."""

import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from casa.models.cache import GrowingLayer, TextCache
from casa.testing import tiny_casa


def states(count, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 3, count, 4, generator=generator, dtype=torch.float64) for _ in range(2))


def select(layer):
    layer.batch_select_indices(torch.arange(layer.keys.shape[0]).flip(0))


def repeat(layer):
    layer.batch_repeat_interleave(2)


def first_row(layer):
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]


CHANGES = {
    "crop": lambda layer: layer.crop(-min(2, layer.get_seq_length())),
    "select": select,
    "repeat": repeat,
    "first row": first_row,
    "copy": lambda layer: None,
}


@pytest.fixture(autouse=True)
def no_gradients():
    """With gradients on, it is transformers' own layer."""
    with torch.no_grad():
        yield


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 30), st.sampled_from(sorted(CHANGES))), max_size=12), st.booleans())
def test_it_holds_what_transformers_own_layer_holds(calls, inference):
    """Whatever is done to it in between, and whether autograd is off or not."""
    ours, theirs = GrowingLayer(), DynamicLayer()
    with torch.inference_mode(inference):
        for number, call in enumerate([3, *calls, 1]):
            if call == "copy":
                ours = copy.deepcopy(ours)
            elif isinstance(call, str):
                for layer in (ours, theirs):
                    CHANGES[call](layer)
            else:
                new = states(call, rows=theirs.keys.shape[0] if number else 2, seed=number)
                for given_back, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
                    assert torch.equal(given_back, wanted)
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)


def test_a_new_token_copies_nothing_while_there_is_room():
    layer = GrowingLayer()
    layer.update(*states(80))
    # all are kept, so that no two are at the same place
    held = [layer.update(*states(1, seed=number)) for number in range(24)]
    places = [(keys.data_ptr(), values.data_ptr()) for keys, values in held]
    # 80 have room for 10 more, 91 for 11
    assert [places.count(place) for place in dict.fromkeys(places)] == [10, 12, 2]


def test_what_is_free_is_an_eighth_at_most():
    layer, held = GrowingLayer(), []
    for number in range(200):
        layer.update(*states(1, seed=number))
        held.append(layer.keys.untyped_storage().nbytes() / (layer.keys.nbytes + layer.values.nbytes))
    assert max(held) <= 1.125
    assert held[0] == 1


def test_a_copy_and_what_it_was_copied_from_write_apart():
    layer = GrowingLayer()
    layer.update(*states(80))
    fork = copy.deepcopy(layer)
    one, other = states(1, seed=1), states(1, seed=2)
    layer.update(*one)
    fork.update(*other)
    assert torch.equal(layer.keys[:, :, -1:], one[0])
    assert torch.equal(fork.keys[:, :, -1:], other[0])


def test_what_inference_mode_made_is_copied_outside_of_it():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(80))
    keys, _ = layer.update(*states(1))
    assert keys.shape[2] == 81
    assert not keys.is_inference()


@pytest.mark.parametrize("learning", [(80, 1, 2), (80,), (1,), (1, 2)], ids=str)
@torch.enable_grad()
def test_gradients_flow_through_what_is_cached(learning):
    """Nothing that the backward pass needs is written over, whichever of the pieces have gradients."""
    ours, theirs = GrowingLayer(), DynamicLayer()
    gradients = []
    for layer in (ours, theirs):
        pieces = [tuple(t.requires_grad_(n in learning) for t in states(n, seed=n)) for n in (80, 1, 2)]
        total = torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            keys, values = layer.update(*piece)
            total = total + (keys * values).square().sum()
        gradients.append(torch.autograd.grad(total, [t for piece in pieces for t in piece if t.requires_grad]))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@torch.enable_grad()
def test_queries_that_learn_find_the_keys_as_they_were():
    """Where nothing else is trained, keys have no gradient, and the queries' gradient still needs them."""
    gradients = []
    for growing in (True, False):
        model = tiny_casa().requires_grad_(False)
        for block in model.backbone.model.layers:
            block.self_attn.q_proj.requires_grad_(True)
        cache = model.new_cache()
        if not growing:
            cache.text.layers[:] = [DynamicLayer() for _ in cache.text.layers]
        losses = [
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits.square().sum()
            for ids in (range(4, 60), [7, 8])
        ]
        sum(losses).backward()
        gradients.append([block.self_attn.q_proj.weight.grad for block in model.backbone.model.layers])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["select", "repeat"])
def test_no_memory_is_held_that_the_tensors_do_not_tell_of(change):
    layer = GrowingLayer()
    layer.update(*states(80))
    old = weakref.ref(layer._buffer)
    CHANGES[change](layer)
    assert old() is None


def test_of_a_layer_and_its_copy_one_has_the_room():
    """As of a session's cache and its twin: both may be fed, in any order."""
    layer, (keys, values) = GrowingLayer(), states(80)
    layer.update(keys, values)
    one, other, first, second = copy.copy(layer), copy.copy(layer), states(1, seed=1), states(2, seed=2)
    one.update(*first)
    other.update(*second)
    layer.update(*states(1, seed=3))
    for found, new in ((one, first), (other, second), (layer, states(1, seed=3))):
        assert torch.equal(found.keys, torch.cat([keys, new[0]], dim=2))
        assert torch.equal(found.values, torch.cat([values, new[1]], dim=2))


@pytest.mark.parametrize("room", [True, False])
def test_another_dtype_is_promoted_as_ever(room):
    layer = GrowingLayer()
    layer.update(*states(80 if room else 7))
    keys, _ = layer.update(*(x.float() for x in states(1)))
    assert keys.dtype == torch.float64


@pytest.mark.parametrize("room", [True, False])
def test_another_number_of_rows_is_refused_as_ever(room):
    layer = GrowingLayer()
    layer.update(*states(80 if room else 7, rows=3))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*states(1, rows=1))


def test_what_was_pickled_goes_on():
    layer = GrowingLayer()
    layer.update(*states(80))
    found = pickle.loads(pickle.dumps(layer))
    for one in (layer, found):
        one.update(*states(1, seed=1))
    assert torch.equal(found.keys, layer.keys)


@pytest.mark.parametrize("config", [False, True], ids=["as it comes", "from a config"])
def test_a_text_cache_is_made_of_them(config):
    model = tiny_casa()
    cache = TextCache(model.config.get_text_config() if config else None)
    cache.update(*states(3), 0)
    assert type(cache.layers[0]) is GrowingLayer


def test_a_model_decodes_into_the_room():
    model = tiny_casa().eval()
    with torch.no_grad():
        cache = model(torch.randint(4, 60, (1, 64)), use_cache=True).past_key_values
        before = cache.text.layers[0].keys.data_ptr()
        for _ in range(8):
            cache = model(torch.tensor([[5]]), past_key_values=cache, use_cache=True).past_key_values
        assert cache.text.layers[0].keys.data_ptr() == before
        assert cache.text.layers[0].keys.shape[2] == 72
