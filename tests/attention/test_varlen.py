"""`varlen` with its kernel replaced by a loop that does what the kernel's documentation says, on a CPU."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.attention import casa_attention, varlen
from casa.attention.common import AttentionInputs
from casa.windows import WindowLayout


def block_by_block(query, key, value, blocks, scale):
    """Attention of each block alone, causal from the bottom right; and what the kernel asks of its arguments."""
    query_ends, key_ends = blocks.query_ends, blocks.key_ends
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    spans = list(zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True))
    assert (spans[0][0][0], spans[0][1][0]) == (0, 0)
    assert (spans[-1][0][1], spans[-1][1][1]) == (len(query), len(key)) == (len(query), len(value))
    assert max(b - a for (a, b), _ in spans) == blocks.max_queries
    assert max(b - a for _, (a, b) in spans) == blocks.max_keys
    results = []
    for (q0, q1), (k0, k1) in spans:
        assert q1 > q0, "an empty block reached the kernel"
        assert k1 > k0, "a block without keys reached the kernel"
        group = query.shape[1] // key.shape[1]
        k, v = (x[k0:k1].repeat_interleave(group, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,shd->hqs", query[q0:q1], k) * scale
        if blocks.causal:
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0)).logical_not()
            scores = scores.masked_fill(hidden, -torch.inf)
        results.append(torch.einsum("hqs,shd->qhd", scores.softmax(dim=-1), v))
    return torch.cat(results)


@pytest.fixture(autouse=True)
def documented_kernel(monkeypatch):
    monkeypatch.setattr(varlen, "kernel", block_by_block)


def run(*tensors, layout, attend="both", scale=0.3, turn=None):
    return varlen.attention(AttentionInputs(*tensors, layout, scale, attend, turn))


def stretch(key, delta):
    """A turn that shows when it is left out or given the wrong distance."""
    return key * (1 - 0.1 * delta)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_equals_the_reference(tools, data):
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    turn = data.draw(st.sampled_from([None, stretch]))
    Hq, Hkv = data.draw(st.sampled_from([(4, 2), (2, 2), (3, 1)]))
    args = tools.tensors(layout, Hq=Hq, Hkv=Hkv)
    want = tools.outcome(
        lambda *t: casa_attention(*t, layout, scale=0.3, attend=attend, impl="reference", turn=turn), args
    )
    got = tools.outcome(lambda *t: run(*t, layout=layout, attend=attend, turn=turn), args)
    for mine, theirs in zip(got, want, strict=True):
        # a few roundings of float64 at values of about 1
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def blocks(*layout, attend="both", turning=False, **more):
    made = varlen.make_blocks(WindowLayout.from_insertions(*layout, **more), attend, turning)
    assert made is not None
    return made


def test_one_block_per_window_where_images_open_it():
    made = blocks([9], [[(0, 5), (4, 3)]])
    assert made.query_ends.tolist() == [0, 4, 9]
    assert made.key_ends.tolist() == [0, 9, 17]
    assert (made.max_queries, made.max_keys, made.causal) == (5, 9, True)
    assert made.query is None
    assert made.out is None
    assert made.key is not None
    assert made.key.index.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 5, 6, 7, 12, 13, 14, 15, 16]


def test_an_image_between_queries_opens_a_block_and_one_behind_all_text_none():
    made = blocks([4], [[(0, 2), (2, 1), (4, 7)]], split="sample")
    assert made.query_ends.tolist() == [0, 2, 4]
    assert made.key_ends.tolist() == [0, 4, 11]
    assert made.key is not None
    assert made.key.index.tolist() == [0, 1, 10, 11, 0, 1, 2, 10, 11, 12, 13]
    # where all of them stand before the first query, they need no block of their own
    assert blocks([4], [[(0, 2), (2, 1)]], split="sample", past=[2]).query_ends.tolist() == [0, 2]


def test_a_single_window_copies_no_key():
    """What a decode step meets: images, then text, in the order in which they are packed."""
    made = blocks([6], [[(0, 8)]], past=[5])
    assert made.query is made.key is made.value is made.out is None
    assert made.key_ends.tolist() == [0, 14]


def test_one_query_per_block_asks_for_no_mask():
    assert not blocks([3, 2], [[(0, 8)], [(0, 4)]], past=[2, 1]).causal
    assert blocks([3, 2], [[(0, 8)], [(0, 4)]], past=[2, 0]).causal
    assert not blocks([3], [[(0, 8)]], attend="image").causal


def test_turned_copies_are_made_once_per_pair_of_windows():
    made = blocks([6], [[(0, 2), (2, 3), (5, 1)]], history=-1, turning=True)
    assert made.turned == ((0, -2), (0, -5), (1, -3))
    inside = blocks([3, 4], [[], [(0, 1), (2, 1)]], history=1, turning=True, split="sample")
    assert inside.turned == ()


def test_text_that_sees_nothing_gets_zeros_that_belong_to_the_graph(tools):
    for lengths, places in (([3, 0], [[(3, 2)], [(0, 1)]]), ([4], [[]]), ([0], [[]])):
        layout = WindowLayout.from_insertions(lengths, places)
        args = tools.tensors(layout)
        args[0].data.fill_(torch.nan)
        out = run(*args, layout=layout, attend="image")
        assert torch.equal(out, torch.zeros(layout.num_query, 4, 4, dtype=torch.float64))
        out.sum().backward()
        assert not args[0].grad.any()


def test_nan_in_one_window_stays_there(tools):
    layout = WindowLayout.from_insertions([3, 5, 4], [[(0, 2)], [(0, 4)], [(0, 3)]])
    args = tools.tensors(layout)
    sick = [t.detach().clone() for t in args]
    for tensor in sick[:3]:
        tensor[3:8] = torch.nan
    for tensor in sick[3:]:
        tensor[2:6] = torch.nan
    well = tools.outcome(lambda *t: run(*t, layout=layout), args)
    got = tools.outcome(lambda *t: run(*t, layout=layout), [t.requires_grad_() for t in sick])
    for number, (mine, theirs) in enumerate(zip(got, well, strict=True)):
        healthy = torch.ones(len(mine), dtype=torch.bool)
        healthy[slice(2, 6) if number >= 4 else slice(3, 8)] = False
        assert mine[~healthy].isnan().any()
        torch.testing.assert_close(mine[healthy], theirs[healthy], rtol=1e-12, atol=1e-12)


def test_planned_once_per_layout_also_when_first_met_in_inference_mode(tools, monkeypatch):
    made = []
    plan = varlen.make_blocks
    monkeypatch.setattr(varlen, "make_blocks", lambda *given: made.append(given) or plan(*given))
    layout = WindowLayout.from_insertions([5], [[(1, 2), (3, 3)]], history=1)
    args = tools.tensors(layout)
    with torch.inference_mode():
        calm = run(*args, layout=layout).clone()
    out = run(*args, layout=layout)
    out.sum().backward()
    assert torch.equal(out.detach(), calm)
    assert made == [(layout, "both", False, torch.device("cpu"))]


def test_a_view_whose_channels_lie_apart_is_copied(tools):
    layout = WindowLayout.from_insertions([4], [[(0, 3)]])
    args = [t.detach() for t in tools.tensors(layout)]
    apart = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in args]
    for attend in ("both", "image"):
        assert torch.equal(run(*apart, layout=layout, attend=attend), run(*args, layout=layout, attend=attend))


@pytest.mark.parametrize("knows_groups", [True, False], ids=["2.12 and later", "2.11"])
@pytest.mark.parametrize(("causal", "window"), [(True, (-1, 0)), (False, (-1, -1))])
def test_what_torchs_function_is_given(monkeypatch, knows_groups, causal, window):
    seen = {}

    def later(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        seen.update(order=(q, k, v, cu_q, cu_k, max_q, max_k), scale=scale, window=window_size, grouped=enable_gqa)

    def earlier(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        later(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.undo()  # the real kernel function
    import torch.nn.attention.varlen as theirs

    monkeypatch.setattr(theirs, "varlen_attn", later if knows_groups else earlier)
    nothing = (None,) * 4
    given = varlen.VarlenBlocks(*nothing, "a", "b", 3, 5, causal, ())  # type: ignore[arg-type]
    varlen.kernel(*"qkv", given, 0.5)  # type: ignore[arg-type]
    assert seen == {"order": (*"qkvab", 3, 5), "scale": 0.5, "window": window, "grouped": knows_groups}


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_function_takes_what_it_is_given(monkeypatch, causal):
    """The installed torch's own operator, forward and backward, on tensors without numbers."""
    monkeypatch.undo()
    made = blocks([9], [[(0, 5), (4, 3)]]).to(torch.device("meta"))
    sizes = [(9, 8), (17, 2), (17, 2)]
    q, k, v = (torch.empty(*size, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes)
    out = varlen.kernel(q, k, v, replace(made, causal=causal), 0.3)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    for tensor, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == tensor.shape
