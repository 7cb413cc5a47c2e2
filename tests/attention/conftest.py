"""Random layouts and tensors for the attention tests, drawn by hypothesis, and a comparison of gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from casa.windows import WindowLayout


@st.composite
def layouts(draw, past: bool = True):
    """Several samples, some of length zero, images anywhere and several at one place, history and past."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    image = [st.tuples(st.integers(0, length), st.integers(1, 4)) for length in lengths]
    insertions = [sorted(draw(st.lists(one, max_size=4)), key=lambda pair: pair[0]) for one in image]
    split = draw(st.sampled_from(["image", "sample"]))
    history = draw(st.sampled_from([0, 1, 2, -1]))
    gone = [draw(st.integers(0, n)) for n in lengths] if past and draw(st.booleans()) else None
    return WindowLayout.from_insertions(lengths, insertions, split, history, gone)


def tensors(layout: WindowLayout, seed: int = 0, Hq: int = 4, Hkv: int = 2, D: int = 4, dtype=torch.float64):
    """query, text_key, text_value, image_key, image_value: leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [layout.num_query, layout.num_text, layout.num_text, layout.num_image, layout.num_image]
    heads = [Hq, Hkv, Hkv, Hkv, Hkv]
    made = [torch.randn(n, h, D, generator=generator, dtype=dtype) for n, h in zip(tokens, heads, strict=True)]
    return [tensor.requires_grad_() for tensor in made]


def outcome(run: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the five gradients for one fixed upstream gradient; zeros where there is no gradient."""
    out = run(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, given, upstream.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True))]


class Tools:
    layouts = staticmethod(layouts)
    tensors = staticmethod(tensors)
    outcome = staticmethod(outcome)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
