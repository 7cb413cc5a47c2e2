"""`flex`: compiled once, against the reference; and what it refuses."""

import shutil
import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from casa.attention import casa_attention, flex
from casa.attention.common import AttentionInputs
from casa.errors import UserError
from casa.windows import WindowLayout

COMPILER = shutil.which(flex._cxx())


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="FlexAttention on a CPU is compiled with a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler, in places that vary by version
def test_forward_equals_the_reference(tools):
    layouts = [
        WindowLayout.from_insertions([20, 0, 9], [[(2, 5), (9, 3), (9, 70)], [(0, 2)], []]),
        WindowLayout.from_insertions([70], [[(3, 5), (20, 9), (70, 4)]], history=1, past=[10]),
        WindowLayout.from_insertions([30, 5], [[(4, 6), (9, 2)], [(1, 3)]], split="sample"),
    ]
    for layout in layouts:
        args = [t.detach() for t in tools.tensors(layout, D=16, dtype=torch.float32)]
        for attend in ("both", "image"):
            want = casa_attention(*args, layout, attend=attend, impl="reference")
            got = casa_attention(*args, layout, attend=attend, impl="flex")
            # worst seen: 6e-7, plain float32 rounding
            torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)


def test_refuses_a_backward_on_cpu(tools):
    layout = WindowLayout.from_insertions([2], [[(0, 1)]])
    with pytest.raises(ValueError, match="flex has no backward on CPU"):
        casa_attention(*tools.tensors(layout), layout, impl="flex")


def test_refuses_to_turn_keys(tools):
    layout = WindowLayout.from_insertions([2], [[(0, 1), (1, 1)]], history=1)
    made = tools.tensors(layout, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="cannot turn"):
        casa_attention(*made, layout, impl="flex", turn=lambda key, delta: key)


def test_a_cpu_without_a_compiler_is_refused_by_name(tools, monkeypatch, tmp_path):
    import_module("torch._inductor.config")  # which reads CXX once and for all: not the one of this test
    layout = WindowLayout.from_insertions([2], [[(0, 1)]])
    made = tools.tensors(layout, dtype=torch.float32)
    monkeypatch.setattr(flex, "_compiled", lambda: lambda query, *rest, **more: query)

    def run():
        with torch.no_grad():
            return casa_attention(*made, layout, impl="flex")

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no '(g|clang)\+\+'; use impl='sdpa', or install one and name it in CXX"):
        run()
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(UserError, match=r"flex needs a C\+\+ compiler on a CPU and there is no 'my-compiler'"):
        run()
    (tmp_path / "my-compiler").symlink_to(sys.executable)
    assert len(run()) == 2


def test_the_compiler_looked_for_is_the_one_that_torch_calls():
    from torch._inductor import config

    assert flex._cxx() == config.cpp.cxx[-1]


def test_no_text_and_no_keys_need_no_compiler(tools):
    with torch.no_grad():
        for layout in (WindowLayout.from_insertions([0], [[]]), WindowLayout.from_insertions([2], [[]])):
            made = tools.tensors(layout, dtype=torch.float32)
            out = flex.attention(AttentionInputs(*made, layout, scale=1.0, attend="image"))
            assert not out.any()
            assert len(out) == layout.num_text


def dense(query, key, value, block_mask, scale, enable_gqa):
    """What the compiled kernel's documentation says, with every score at once; zeros for queries that see nothing."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    seen = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    # none of an empty row's scores may become a NaN: its gradient would be one too
    scores = (query @ key.mT * scale).masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1).masked_fill(~seen, 0.0) @ value


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_equals_the_reference_forward_and_backward(tools, data):
    """Everything but the compiled kernel: padding, masks, the order of keys, and what of it gradients flow through."""
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    Hq, Hkv = data.draw(st.sampled_from([(4, 2), (2, 2)]))
    args = tools.tensors(layout, Hq=Hq, Hkv=Hkv)

    def run(*tensors):
        return flex.attention(AttentionInputs(*tensors, layout, scale=0.3, attend=attend))

    want = tools.outcome(lambda *t: casa_attention(*t, layout, scale=0.3, attend=attend, impl="reference"), args)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flex, "_compiled", lambda: dense)
        got = tools.outcome(run, args)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_block_mask_is_the_layouts_mask(tools, data):
    """The rule by which the kernel masks, written out whole; the compiled kernel is tried on a few layouts above."""
    layout = data.draw(tools.layouts())
    attend = data.draw(st.sampled_from(["both", "image"]))
    columns = layout.num_image + (layout.num_text if attend == "both" else 0)
    if not layout.num_query or not columns:
        return
    made = flex._block_mask(layout, attend, torch.device("cpu"))
    assert made.seq_lengths == (128, 128)
    seen = create_mask(made.mask_mod, 1, 1, 128, 128, device="cpu")[0, 0]
    assert torch.equal(seen[: layout.num_query, :columns], layout.mask()[:, :columns])
    assert not seen[layout.num_query :].any()
    assert not seen[:, columns:].any()


def test_torchs_bound_on_compiled_sizes_is_raised_for_the_call_only(tools, monkeypatch):
    from torch._dynamo import config

    seen = []

    def compiled(query, key, value, block_mask, scale, enable_gqa):
        seen.append((config.recompile_limit, block_mask.BLOCK_SIZE, query.shape[2], key.shape[2], enable_gqa))
        return query

    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "_cxx", lambda: sys.executable)
    before = config.recompile_limit
    layout = WindowLayout.from_insertions([150], [[(0, 400)]])
    with torch.no_grad():
        casa_attention(*tools.tensors(layout, dtype=torch.float32), layout, impl="flex")
    assert seen == [(max(flex.KERNELS, before), (128, 128), 256, 1024, True)]
    assert config.recompile_limit == before
