"""`sdpa` against the reference in float64, and the promises of the operation itself, on random layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.attention import casa_attention, sdpa
from casa.windows import WindowLayout

IMPLS = ["reference", "sdpa"]


def close(mine, theirs):
    # a few roundings of float64 at values of about 1
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def stretch(key, delta):
    """A turn that shows when it is left out or given the wrong distance."""
    return key * (1 - 0.1 * delta)


@pytest.mark.slow
@pytest.mark.parametrize("call_cost", [0.0, sdpa.CALL, 1e12], ids=["never pad", "as shipped", "pad all"])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_equals_the_reference(tools, call_cost, data):
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    turn = data.draw(st.sampled_from([None, stretch]))
    scale = data.draw(st.sampled_from([None, 0.3]))
    Hq, Hkv = data.draw(st.sampled_from([(4, 2), (2, 2), (3, 1)]))
    args = tools.tensors(layout, Hq=Hq, Hkv=Hkv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "CALL", call_cost)
        results = [
            tools.outcome(
                lambda *t, impl=impl: casa_attention(*t, layout, scale=scale, attend=attend, impl=impl, turn=turn),
                args,
            )
            for impl in IMPLS
        ]
    for want, got in zip(*results, strict=True):
        close(got, want)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(("image", "text"), [(63, 1), (1, 63), (65, 33)])
def test_odd_lengths_in_float32_err_no_more_than_plain_torch(tools, windows, image, text):
    layout = WindowLayout.from_insertions([windows * text], [[(n * text, image) for n in range(windows)]])
    exact = tools.tensors(layout, Hq=8, Hkv=2, D=64)
    single = [t.detach().float().requires_grad_() for t in exact]

    def run(impl, args):
        return tools.outcome(lambda *t: casa_attention(*t, layout, impl=impl), args)

    truth = run("reference", exact)
    for want, plain, fast in zip(truth, run("reference", single), run("sdpa", single), strict=True):
        error = (plain.double() - want).abs().max().item()
        # a lone value or weight can be exact in one and one rounding off in the other
        assert (fast.double() - want).abs().max().item() <= 2 * error + 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_packed_equals_each_sample_alone(tools, impl, data):
    layout = data.draw(tools.layouts())
    args = tools.tensors(layout)
    packed = casa_attention(*args, layout, impl=impl)
    query = text = image = 0
    for sample, (length, places) in enumerate(zip(layout.text_lengths, layout.insertions, strict=True)):
        past = None if layout.past is None else [layout.past[sample]]
        alone = WindowLayout.from_insertions([length], [places], layout.split, layout.history, past)
        q = slice(query, query + alone.num_query)
        t = slice(text, text + alone.num_text)
        i = slice(image, image + alone.num_image)
        part = casa_attention(args[0][q], args[1][t], args[2][t], args[3][i], args[4][i], alone, impl=impl)
        close(packed[q], part)
        query, text, image = q.stop, t.stop, i.stop


@pytest.mark.parametrize("impl", IMPLS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_prefill_in_pieces_equals_one_pass(tools, impl, data):
    full = data.draw(tools.layouts(past=False))
    args = tools.tensors(full)
    attend = data.draw(st.sampled_from(["both", "image"]))
    whole = casa_attention(*args, full, attend=attend, impl=impl, turn=stretch)
    cuts = [data.draw(st.integers(0, length)) for length in full.text_lengths]
    # the first piece holds the first `cut` tokens of each sample and the images standing before their end
    rows, columns, before, offset, image = [], [], [], 0, 0
    for length, places, cut in zip(full.text_lengths, full.insertions, cuts, strict=True):
        rows += range(offset, offset + cut)
        before.append([place for place in places if place[0] <= cut])
        for position, tokens in places:
            columns += range(image, image + tokens) if position <= cut else ()
            image += tokens
        offset += length
    first = WindowLayout.from_insertions(cuts, before, full.split, full.history)
    piece = [args[0][rows], args[1][rows], args[2][rows], args[3][columns], args[4][columns]]
    close(casa_attention(*piece, first, attend=attend, impl=impl, turn=stretch), whole[rows])
    rest = WindowLayout.from_insertions(full.text_lengths, full.insertions, full.split, full.history, cuts)
    later = casa_attention(args[0][rest.query_index], *args[1:], rest, attend=attend, impl=impl, turn=stretch)
    close(later, whole[rest.query_index])


@pytest.mark.parametrize("impl", IMPLS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_what_is_not_seen_changes_nothing_bit_for_bit(tools, impl, data):
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    if not layout.num_query:
        return
    args = [t.detach() for t in tools.tensors(layout)]
    row = data.draw(st.integers(0, layout.num_query - 1))
    before = casa_attention(*args, layout, attend=attend, impl=impl)
    seen = layout.mask()[row]
    images, text = seen[: layout.num_image], seen[layout.num_image :]
    if attend == "image":
        text = torch.zeros_like(text)
    other = [args[0].clone(), *(t.clone() for t in args[1:])]
    other[0][torch.arange(layout.num_query) != row] = 7.0
    for tensor, keep in zip(other[1:], [text, text, images, images], strict=True):
        tensor[~keep] = -3.0
    after = casa_attention(*other, layout, attend=attend, impl=impl)
    assert torch.equal(after[row], before[row])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call_cost", [0.0, 1e12])
def test_nan_in_one_window_stays_there(tools, impl, call_cost, monkeypatch):
    """Also where windows of different sizes are padded into one call, and in every gradient."""
    monkeypatch.setattr(sdpa, "CALL", call_cost)
    layout = WindowLayout.from_insertions([3, 5, 4], [[(0, 2)], [(0, 4)], [(0, 3)]])
    args = tools.tensors(layout)
    sick = [t.detach().clone() for t in args]
    for tensor in sick[:3]:
        tensor[3:8] = torch.nan
    for tensor in sick[3:]:
        tensor[2:6] = torch.nan
    run = lambda *t: casa_attention(*t, layout, impl=impl)  # noqa: E731
    well = tools.outcome(run, args)
    got = tools.outcome(run, [t.requires_grad_() for t in sick])
    for number, (mine, theirs) in enumerate(zip(got, well, strict=True)):
        healthy = torch.ones(len(mine), dtype=torch.bool)
        healthy[slice(2, 6) if number >= 4 else slice(3, 8)] = False
        assert mine[~healthy].isnan().any()
        close(mine[healthy], theirs[healthy])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_visible_gives_zeros_that_belong_to_the_graph(tools, impl):
    layout = WindowLayout.from_insertions([3, 0], [[(3, 2)], [(0, 1)]])
    args = tools.tensors(layout)
    args[0].data.fill_(torch.nan)
    out = casa_attention(*args, layout, attend="image", impl=impl)
    assert torch.equal(out, torch.zeros(3, 4, 4, dtype=torch.float64))
    out.sum().backward()
    assert not args[0].grad.any()


@pytest.mark.parametrize("impl", [pytest.param("reference", marks=pytest.mark.slow), "sdpa"])
def test_second_derivatives(tools, impl):
    layout = WindowLayout.from_insertions([3, 2], [[(1, 2)], [(0, 1)]], history=1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run = lambda *t: casa_attention(*t, layout, impl=impl)  # noqa: E731
        assert torch.autograd.gradgradcheck(run, tools.tensors(layout, Hq=2, Hkv=1, D=2))


def test_a_layout_first_met_in_inference_mode_can_be_trained_on(tools):
    layout = WindowLayout.from_insertions([5], [[(1, 2), (3, 3)]], history=1)
    args = tools.tensors(layout)
    with torch.inference_mode():
        calm = casa_attention(*args, layout).clone()
    out = casa_attention(*args, layout)
    out.sum().backward()
    assert torch.equal(out.detach(), calm)


def test_no_mask_over_everything_and_no_repeated_keys(tools, monkeypatch):
    """What reaches the kernel: one call, keys with their own head count, a mask no wider than a window."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **rest):
        seen.append((tuple(q.shape), tuple(k.shape), None if attn_mask is None else tuple(attn_mask.shape)))
        return kernel(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    layout = WindowLayout.from_insertions([12], [[(0, 5), (4, 5), (8, 5)]])
    casa_attention(*tools.tensors(layout), layout)
    assert seen == [((3, 2, 8, 4), (3, 2, 9, 4), (1, 1, 8, 9))]
    seen.clear()
    casa_attention(*tools.tensors(layout), layout, attend="image")
    assert seen == [((3, 2, 8, 4), (3, 2, 5, 4), None)]


# which windows share a batch, by cost


def calls(texts, images, width=512, **more):
    position, insertions = 0, []
    for text, image in zip(texts, images, strict=True):
        insertions.append((position, image))
        position += text
    made = sdpa.make_batches(WindowLayout.from_insertions([position], [insertions], **more), "both", width, False)
    return [] if made is None else [batch.windows for batch in made.batches]


def test_equal_windows_share_one_call():
    assert calls([16] * 5, [64] * 5) == [(0, 1, 2, 3, 4)]


def test_near_equal_windows_are_padded_into_one_call():
    assert calls([4, 5, 4], [8, 8, 9]) == [(0, 2, 1)]


def test_windows_far_apart_are_not_padded():
    assert calls([4, 90], [256, 256]) == [(0,), (1,)]


def test_narrow_heads_allow_more_padding():
    assert calls([4, 30], [256, 256], width=512) == [(0,), (1,)]
    assert calls([4, 30], [256, 256], width=16) == [(0, 1)]


def test_windows_without_text_take_no_part():
    assert calls([4, 0], [3, 3]) == [(0,)]
    assert calls([], []) == []


def test_equal_windows_need_one_mask_and_ragged_ones_their_own():
    even = WindowLayout.from_insertions([4], [[(0, 2), (2, 2)]])
    odd = WindowLayout.from_insertions([5], [[(0, 2), (2, 2)]])
    cpu = torch.device("cpu")
    for layout, masks in ((even, 1), (odd, 2)):
        made = sdpa.make_batches(layout, "both", 8, False)
        assert made is not None
        bias = made.batches[0].bias(3, torch.float64, cpu)
        assert bias is not None
        assert bias.shape[0] == masks
        assert bias.shape[2] == 3 * made.batches[0].queries
        assert bias.dtype == torch.float64
