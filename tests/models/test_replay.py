"""Replayed tokens are those that are launched. In place of a CUDA graph: torch's trace of a token, which repeats the
same operations on the same tensors, and like a graph nothing of what Python computes.
"""

import copy
import pickle

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from casa.models import decoding, replay
from casa.streaming import StreamingSession
from casa.testing import TinySample, as_batch, noise_frames, tiny_casa, tiny_casa_over, tiny_processor, tiny_speaker
from tests.few import few_first
from tests.models.conftest import FEW, FUSIONS, SAMPLES
from tests.models.test_decoding import PREPARED, PROMPT, tensors

COUNT = 10  # tokens, of which the first replay.PATIENCE are launched
# what CUDA does not let into a graph: numbers that Python brings or takes away, and sizes that hang on values
FORBIDDEN = ("lift_fresh", "_local_scalar_dense", "nonzero", "aten.item", "unique", "masked_select")


@pytest.fixture
def captured(monkeypatch):
    """Has tokens captured; the traces, in order."""
    traces = []

    def capture(run):
        found = run().clone()
        trace = make_fx(lambda: run())()
        traces.append(trace)
        return lambda: found.copy_(trace()), found

    monkeypatch.setattr(replay, "capture", capture)
    monkeypatch.setattr(decoding, "is_replayed", lambda _: not replay._launched.get())
    return traces


@torch.no_grad()
def go_on(model, cache, count=COUNT, first=3, mask=None):
    """Logits (B, count, V) of tokens fed one by one."""
    found = []
    for number in range(count):
        ids = (torch.arange(cache.num_rows)[:, None] * 11 + 7 * number + first) % 50 + 3
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        found.append(model(input_ids=ids, past_key_values=cache, use_cache=True, attention_mask=mask).logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def prefilled(model, inputs):
    return model(**inputs, use_cache=True).past_key_values


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def same_caches(one, other):
    for mine, theirs in zip(tensors(one), tensors(other), strict=True):
        same(mine, theirs)


def both(model, inputs):
    """Replayed and launched."""
    quick = prefilled(model, inputs)
    found = go_on(model, quick, mask=inputs.get("attention_mask"))
    with replay.launched():
        slow = prefilled(model, inputs)
        wanted = go_on(model, slow, mask=inputs.get("attention_mask"))
    same(found, wanted)
    same_caches(quick, slow)


INPUTS = {"one": PROMPT.inputs(), "rows": as_batch(SAMPLES), "text": SAMPLES[1].inputs()}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("fusion", few_first([name for name in FUSIONS if name != "replace first"], FEW))
def test_variants(fusion, inputs, captured):
    model = tiny_casa(**FUSIONS[fusion])
    both(model, INPUTS[inputs])
    # images of earlier windows that are turned are launched
    turned = model.fusion.history and model.fusion.attend == "both" and inputs != "text"
    assert len(captured) == (not turned)


@pytest.mark.parametrize("kind", PREPARED)
def test_families(kind, captured):
    sample = PROMPT.in_squares() if kind == "smolvlm" else PROMPT
    both(tiny_casa_over(kind), sample.inputs())
    (trace,) = captured
    names = {str(node.target) for node in trace.graph.nodes}
    assert not [name for name in names if any(word in name for word in FORBIDDEN)]


def test_room_that_is_full_is_made_anew(captured, monkeypatch):
    monkeypatch.setattr(replay, "AHEAD", 3)
    model = tiny_casa()
    quick = prefilled(model, PROMPT.inputs())
    found = go_on(model, quick, 30)
    assert 2 <= len(captured) <= 6
    with replay.launched():
        same(found, go_on(model, prefilled(model, PROMPT.inputs()), 30))


def test_other_rows_and_other_weights_are_captured_anew(captured):
    model = tiny_casa()
    one, other = prefilled(model, as_batch(SAMPLES)), prefilled(model, as_batch(SAMPLES))
    mask = as_batch(SAMPLES)["attention_mask"]

    found = [go_on(model, one, mask=mask)]
    with replay.launched():
        wanted = [go_on(model, other, mask=mask)]
    shown = torch.cat([mask, mask.new_ones(len(mask), COUNT)], dim=1)[[2, 0]]
    for cache in (one, other):
        cache.batch_select_indices(torch.tensor([2, 0]))
    found.append(go_on(model, one, mask=shown))
    with replay.launched():
        wanted.append(go_on(model, other, mask=shown))
    assert len(captured) == 2
    block = model.decoder.blocks[0]
    block.mlp.down_proj = copy.deepcopy(block.mlp.down_proj)
    block.mlp.down_proj.weight.data.mul_(2)
    shown = torch.cat([shown, shown.new_ones(2, COUNT)], dim=1)
    found.append(go_on(model, one, mask=shown))
    with replay.launched():
        wanted.append(go_on(model, other, mask=shown))
    assert len(captured) == 3
    for mine, theirs in zip(found, wanted, strict=True):
        same(mine, theirs)


def test_a_frame_is_copied_in_and_several_tokens_at_once_are_launched(captured):
    model = tiny_casa()
    caches = [prefilled(model, PROMPT.inputs()) for _ in range(2)]
    frames = [TinySample((7, 30), ((1, rows, 3),), seed=rows).inputs() for rows in (2, 3, 1)]

    @torch.no_grad()
    def run(cache):
        found = [go_on(model, cache)]
        for number, frame in enumerate(frames):
            found.append(model(**frame, past_key_values=cache, use_cache=True).logits)
            found.append(go_on(model, cache, 4, first=number))
            several = torch.tensor([[5, 6, 7 + number]])
            found.append(model(input_ids=several, past_key_values=cache, use_cache=True).logits)
            found.append(go_on(model, cache, 3, first=9))
        return torch.cat(found, dim=1)

    found = run(caches[0])
    with replay.launched():
        wanted = run(caches[1])
    assert len(captured) == 1
    same(found, wanted)
    same_caches(*caches)


def test_a_cache_that_did_not_go_on_keeps_what_it_had(captured):
    model = tiny_casa()
    cache = prefilled(model, PROMPT.inputs())
    go_on(model, cache)
    with replay.launched():
        other = prefilled(model, PROMPT.inputs())
        go_on(model, other)
    twin = cache.twin()
    with torch.no_grad():
        model(**TinySample((7, 30), ((1, 2, 3),), seed=2).inputs(), past_key_values=twin, use_cache=True)
    go_on(model, twin)
    assert len(captured) == 1
    # a frame has been copied over what both had held
    same_caches(cache, other)
    for _ in range(3):
        kept = twin.twin()  # each lets go of the one before
        twin = kept.twin()
    assert len(twin.replays._graph.windows.lent) <= 2 * len(cache.windows.layers)
    found = go_on(model, cache)
    with replay.launched():
        same(found, go_on(model, other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_itself(copied, captured):
    model = tiny_casa()
    cache = prefilled(model, PROMPT.inputs())
    go_on(model, cache)
    mine = copied(cache)
    found = go_on(model, mine), go_on(model, cache)
    assert len(captured) == 2
    same(*found)
    same_caches(mine, cache)


def test_tokens_taken_back_and_padding_that_ends(captured):
    model = tiny_casa()
    quick, slow = prefilled(model, PROMPT.inputs()), prefilled(model, PROMPT.inputs())

    def run(cache):
        found = [go_on(model, cache)]
        cache.crop(-3)
        found.append(go_on(model, cache, 4, first=2))
        return torch.cat(found, dim=1)

    found = run(quick)
    with replay.launched():
        same(found, run(slow))
    same_caches(quick, slow)


def test_what_cannot_be_captured_is_launched_and_told_once(captured, monkeypatch, caplog):
    def refuse(run):
        run()
        captured.append(None)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture", refuse)
    model = tiny_casa()
    for _ in range(2):
        both(model, PROMPT.inputs())
    assert len(captured) == 1
    assert caplog.text.count("cannot be captured") == 1


def test_a_live_session_has_one_graph(captured):
    model, processor = tiny_speaker(), tiny_processor()

    frames = noise_frames(7, 6)
    mine, theirs = (StreamingSession(model, processor, max_new_tokens=8) for _ in range(2))
    found = [mine.step(frame) for frame in frames]
    assert any(found)
    assert len(captured) == 1
    with replay.launched():
        assert found == [theirs.step(frame) for frame in frames]
    same_caches(mine._cache, theirs._cache)


def test_positions_that_look_at_the_length_are_launched(captured):
    model = tiny_casa()
    rotary = model.decoder.stack.get_submodule("rotary_emb")
    rotary.rope_type, rotary.original_max_seq_len = "dynamic", rotary.max_seq_len_cached
    both(model, PROMPT.inputs())
    assert not captured
