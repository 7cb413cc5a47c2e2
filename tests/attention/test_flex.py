"""`flex`: compiled once, against the reference; and what it refuses."""

import shutil

import pytest
import torch

from casa.attention import casa_attention
from casa.windows import WindowLayout

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


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
    with torch.no_grad(), pytest.raises(ValueError, match="cannot turn"):
        casa_attention(*tools.tensors(layout), layout, impl="flex", turn=lambda key, delta: key)


def test_no_text_and_no_keys_need_no_compiler(tools):
    with torch.no_grad():
        for layout in (WindowLayout.from_insertions([0], [[]]), WindowLayout.from_insertions([2], [[]])):
            out = casa_attention(*tools.tensors(layout), layout, attend="image", impl="flex")
            assert not out.any()
            assert len(out) == layout.num_text
