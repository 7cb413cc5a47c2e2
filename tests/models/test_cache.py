"""The cache: text only, and the state of the visible windows; rows move, tokens are taken back or forgotten."""

import copy

import pytest
import torch
from hypothesis import given
from transformers import StaticCache

from casa.errors import UserError
from casa.layers import Turner
from casa.models.cache import CACHE
from casa.testing import TinySample, tiny_casa
from casa.testing.drawn import SEVERAL, texts_in_pieces

# windows: 2 text | 6 image, 3 text | 2 image, 2 text
SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)), seed=4)


def fed(model, sample=SAMPLE):
    with torch.no_grad():
        return model(**sample.inputs(), use_cache=True).past_key_values


@torch.no_grad()
def after(model, cache, *tokens):
    """Logits of a few more tokens, one call each; the cache given stays as it is."""
    cache = copy.deepcopy(cache)
    new = [torch.tensor([token] * rows_of(cache))[:, None] for token in tokens]
    return torch.cat([model(input_ids=ids, past_key_values=cache).logits for ids in new], dim=1)


def turns(model):
    blocks = range(len(model.decoder.blocks))
    return [Turner(rotary) for rotary in model.decoder.rotaries(blocks, model.device, model.dtype)]


def rows_of(cache):
    return next(layer.keys.shape[0] for layer in cache.text.layers if layer.is_initialized)


def lengths(cache):
    return {layer.keys.shape[2] for layer in cache.text.layers if layer.is_initialized}


def test_the_text_cache_holds_text_only(fused):
    cache = fed(fused)
    assert lengths(cache) == {7}
    assert cache.get_seq_length() == cache.num_text == 7
    filled = [index for index, layer in enumerate(cache.text.layers) if layer.is_initialized]
    replaced = fused.fused_blocks if fused.fusion.placement == "replace" else ()
    assert filled == [index for index in range(3) if index not in replaced]


def test_image_state_is_that_of_the_visible_windows(fused):
    cache = fed(fused)
    visible = {(0, "image"): 2, (1, "image"): 8, (-1, "image"): 8, (0, "sample"): 8}
    wanted = visible[fused.fusion.history, fused.fusion.split]
    assert cache.image_tokens == wanted
    layers = cache.windows.layers
    assert len(layers) == len(fused.fused_blocks)
    assert {layer.images for layer in layers} == {wanted}
    assert cache.image_bytes == wanted * len(layers) * 2 * 2 * 8 * 8  # keys and values, 2 heads of 8 doubles
    assert cache.text_bytes == 7 * (3 - len(fused.fused_blocks) * (fused.fusion.placement == "replace")) * 2 * 2 * 8 * 8
    own_text = 7 if fused.fusion.split == "sample" else 2
    assert cache.windows.text_tokens == [own_text]
    held = 0 if fused.fusion.attend == "image" else own_text
    assert cache.num_bytes - cache.text_bytes - cache.image_bytes == held * len(layers) * 2 * 2 * 8 * 8


@pytest.mark.parametrize("name", ["parallel", "replace sample", "history 1", "history all", "cross"])
@SEVERAL
@given(drawn=texts_in_pieces())
def test_of_any_text_the_words_and_the_visible_pictures_are_held_and_nothing_else(casa_of, name, drawn):
    model, (sample, cuts, late), cache = casa_of(name), drawn, None
    for call in sample.calls(cuts, late):
        with torch.no_grad():
            cache = model(**call, past_key_values=cache, use_cache=True).past_key_values
    assert lengths(cache) == {cache.num_text} == {len(sample.ids)}
    # pictures with no text between them are one run, and a run opens a window
    opened = sorted({place for place, _, _ in sample.pictures})
    runs = [sum(rows * columns for place, rows, columns in sample.pictures if place == at) for at in opened]
    together = model.fusion.split == "sample"
    visible = sum(runs if together or model.fusion.history == -1 else runs[-(model.fusion.history + 1) :])
    assert cache.image_tokens == visible
    if cache.windows is None:
        assert not sample.pictures
        return
    assert {layer.images for layer in cache.windows.layers} == {visible}
    assert cache.windows.text_tokens == [len(sample.ids) - (opened[-1] if opened and not together else 0)]


def test_held_bytes_are_those_of_the_memory_itself(casa_of):
    cache = fed(casa_of("parallel"))
    layers = cache.windows.layers
    room = sum(t.numel() * 8 for layer in layers for t in (layer.key, layer.value))
    assert cache.held_bytes == cache.text_bytes + room > cache.num_bytes
    held = cache.held_bytes
    cache.crop(-1)  # what is left is a view of what was there
    assert cache.held_bytes == held
    layers[1].key = layers[0].key
    assert cache.held_bytes == held - layers[0].key.numel() * 8


def test_state_does_not_grow_with_frames(casa_of):
    model, sizes = casa_of("parallel"), []
    stream = TinySample(tuple(range(3, 33)), tuple((place, 1, 2) for place in range(0, 30, 3)))
    cache = None
    for call in stream.calls(range(3, 30, 3), late=True):
        with torch.no_grad():
            cache = model(**call, past_key_values=cache, use_cache=True).past_key_values
        sizes.append((cache.image_tokens, cache.image_bytes, cache.num_bytes - cache.text_bytes, cache.text_bytes))
    assert len({size[:3] for size in sizes}) == 1
    assert [size[3] for size in sizes] == [sizes[0][3] * (n + 1) for n in range(10)]


def test_insertion_keeps_its_images(casa_of):
    cache = fed(casa_of("insertion"))
    assert lengths(cache) == {15}
    assert (cache.get_seq_length(), cache.image_tokens, cache.image_bytes) == (7, 8, 0)


def two_rows(model):
    rows = [SAMPLE, TinySample((40, 6, 13, 22, 50, 3, 7), ((0, 2, 2), (3, 3, 1)), seed=6)]
    inputs = [row.inputs() for row in rows]
    joined = {name: torch.cat([x[name] for x in inputs]) for name in inputs[0]}
    joined["image_positions"][2:, 0] = 1
    with torch.no_grad():
        return rows, model(**joined, use_cache=True).past_key_values


@pytest.mark.slow
def test_reorder_select_and_repeat_move_whole_rows(model, close):
    rows, cache = two_rows(model)
    first, second = (after(model, fed(model, row), 11, 12)[0] for row in rows)
    for change, wanted in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [second, first]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [second, second]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [second]),
        (lambda c: c.batch_repeat_interleave(2), [first, first, second, second]),
    ):
        moved = copy.deepcopy(cache)
        change(moved)
        close(after(model, moved, 11, 12), torch.stack(wanted))


@pytest.mark.slow
def test_a_copy_of_a_cache_goes_its_own_way(model):
    cache = fed(model)
    wanted = after(model, cache, 11, 12)
    twin = copy.deepcopy(cache)
    after(model, twin, 40, 41, 42)
    with torch.no_grad():
        model(input_ids=torch.tensor([[50]]), past_key_values=twin)
    assert torch.equal(after(model, cache, 11, 12), wanted)
    assert (cache.num_text, twin.num_text) == (7, 8)


@pytest.mark.slow
def test_what_a_twin_is_fed_leaves_no_trace(model):
    cache = fed(model)
    wanted = after(model, cache, 11, 12)
    twin = cache.twin()
    with torch.no_grad():
        for token in range(30, 50):  # more than there is room for behind the window
            model(input_ids=torch.tensor([[token]]), past_key_values=twin)
        model(**SAMPLE.inputs(), past_key_values=twin)
    assert (cache.num_text, twin.num_text) == (7, 34)
    assert torch.equal(after(model, cache, 11, 12), wanted)


@pytest.mark.slow
def test_a_window_begins_again_at_its_images(fused, close):
    """What comes next sees the frame as if nothing had been said of it."""
    cache = fed(fused)
    if fused.fusion.split == "sample":
        with pytest.raises(UserError, match="in the middle of this window"):
            cache.windows.forget_text()
        return
    silent = fed(fused, TinySample(SAMPLE.ids[:5], SAMPLE.pictures, SAMPLE.seed))
    cache.text.crop(-2)
    cache.num_text -= 2
    cache.windows.forget_text()
    assert cache.windows.windows == silent.windows.windows
    close(after(fused, cache, 11, 12), after(fused, silent, 11, 12))
    with torch.no_grad():  # and in one call
        several = [fused(input_ids=torch.tensor([[11, 12]]), past_key_values=c).logits for c in (cache, silent)]
    close(*several)


@pytest.mark.slow
def test_crop_takes_back_what_was_said(fused, close):
    cache = fed(fused)
    wanted = after(fused, cache, 11, 12, 13)
    with torch.no_grad():
        for token in (40, 41, 42):
            fused(input_ids=torch.tensor([[token]]), past_key_values=cache)
    cache.crop(-3)
    assert (cache.num_text, lengths(cache)) == (7, {7})
    close(after(fused, cache, 11, 12, 13), wanted)
    cache.crop(0)
    close(after(fused, cache, 11, 12, 13), wanted)


@pytest.mark.parametrize("count", [3, 8])
def test_crop_across_an_image_is_refused_and_changes_nothing(casa_of, count):
    model = casa_of("parallel")
    cache = fed(model)
    wanted = after(model, cache, 11)
    with pytest.raises(UserError, match="cannot take back"):
        cache.crop(-count)
    assert torch.equal(after(model, cache, 11), wanted)


def test_crop_across_an_image_within_a_window_is_refused(casa_of):
    model = casa_of("sample")
    cache = fed(model)
    cache.crop(-2)  # the text behind the last image
    with pytest.raises(UserError, match="an image stands among them"):
        cache.crop(-1)


def test_crop_of_more_than_there_is_or_of_insertion_is_refused(casa_of):
    cache = fed(casa_of("parallel"), TinySample((5, 6, 7)))
    with pytest.raises(UserError, match="cannot take back 4 tokens of 3"):
        cache.crop(-4)
    with pytest.raises(UserError, match="negative number"):
        cache.crop(2)
    with pytest.raises(UserError, match="cannot be cropped"):
        fed(casa_of("insertion")).crop(-1)


def test_reset_is_a_new_cache(model, close):
    cache = fed(model)
    cache.reset()
    assert (cache.num_text, cache.get_seq_length(), cache.image_tokens) == (0, 0, 0)
    with torch.no_grad():
        found = model(**SAMPLE.inputs(), past_key_values=cache).logits
        close(found, model(**SAMPLE.inputs()).logits)


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 3), (2, 5), (3, 0)])
@pytest.mark.parametrize("placement", ["parallel", "before"])
def test_dropped_text_is_as_if_it_had_never_been(close, placement, first, count):
    """In a model of one block the cached keys know nothing of other tokens, so forgetting is exact."""
    from casa import FusionConfig, adapt
    from casa.testing import tiny_encoder, tiny_text_model

    fusion = FusionConfig(placement=placement)
    model = adapt(tiny_text_model(num_hidden_layers=1), fusion, vision=tiny_encoder()).eval()
    ids = (5, 9, 17, 4, 33, 8, 21)
    cache = fed(model, TinySample(ids))
    cache.drop_text(first, count, turns(model))
    fresh = fed(model, TinySample(ids[:first] + ids[first + count :]))
    assert cache.num_text == fresh.num_text == 7 - count
    frame = TinySample((40, 41, 42), ((0, 2, 2),), seed=9).inputs()
    with torch.no_grad():
        # the model's rotary factors are float32, so turning twice is exact to that only
        logits = [model(**frame, past_key_values=c).logits for c in (cache, fresh)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_dropping_moves_later_keys_up_and_leaves_windows(casa_of):
    model = casa_of("parallel")
    cache = fed(model)
    before = copy.deepcopy(cache)
    cache.drop_text(1, 2, turns(model))
    assert (cache.num_text, lengths(cache)) == (5, {5})
    for old, new in zip(before.text.layers, cache.text.layers, strict=True):
        assert torch.equal(new.keys[:, :, :1], old.keys[:, :, :1])
        assert torch.equal(new.values, old.values[:, :, [0, 3, 4, 5, 6]])
    assert cache.windows.windows == before.windows.windows
    # block 0's keys are those of the same tokens at the closed-up positions
    fresh = fed(model, TinySample((5, 4, 33, 8, 21)))
    torch.testing.assert_close(cache.text.layers[0].keys, fresh.text.layers[0].keys, rtol=1e-6, atol=1e-6)


def test_drops_that_cannot_be_are_refused(casa_of):
    cache = fed(casa_of("parallel"))
    for first, count in ((0, 8), (-1, 2), (5, 3), (3, -1)):
        with pytest.raises(UserError, match="cannot drop"):
            cache.drop_text(first, count, lambda key, by: key)
    with pytest.raises(UserError, match="inserted images"):
        fed(casa_of("insertion")).drop_text(0, 1, lambda key, by: key)


def test_a_static_cache_is_refused(casa_of):
    model = casa_of("parallel")
    static = StaticCache(config=model.config.text_config, max_cache_len=16)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UserError, match="past_key_values must come from"):
        model(input_ids=ids, past_key_values=static)
    with pytest.raises(UserError, match="'static' is not supported"):
        model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_either_name(model, close, name):
    """transformers 5.24 renamed it; programs for both are at work."""
    new = torch.tensor([[11, 12]])
    with torch.no_grad():
        cache = model(**SAMPLE.inputs(), use_cache=True)[CACHE]
        close(model(input_ids=new, **{name: cache}).logits, model(input_ids=new, past_key_values=fed(model)).logits)
    assert cache.num_text == len(SAMPLE.ids) + 2
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    mine = model.new_cache()
    assert torch.equal(
        model.generate(**SAMPLE.inputs(), **how, **{name: mine}), model.generate(**SAMPLE.inputs(), **how)
    )
    assert mine.num_text == len(SAMPLE.ids) + 2


def test_prefill_in_inference_mode_then_no_grad(few, close):
    """Servers mix the two; the state's buffers must allow it."""
    with torch.inference_mode():
        cache = few(**SAMPLE.inputs(), use_cache=True).past_key_values
    with torch.no_grad():
        found = few(input_ids=torch.tensor([[11]]), past_key_values=cache).logits
    close(found, after(few, fed(few), 11))


def test_replacing_the_first_block_still_counts_tokens():
    model = tiny_casa(placement="replace", layers=[0])
    cache = fed(model)
    assert not cache.text.layers[0].is_initialized
    assert (cache.text.get_seq_length(), cache.get_seq_length()) == (7, 7)
    assert cache.text.get_mask_sizes(2) == cache.text.get_mask_sizes(2, 1) == (9, 0)
