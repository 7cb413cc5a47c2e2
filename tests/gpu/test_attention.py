"""Every implementation on the GPU against the reference in float64: outputs and gradients, packed and decoding."""

import pytest
import torch

from casa.attention import casa_attention, implementations
from casa.attention.common import AttentionRequest
from casa.attention.dispatch import choose, refusal
from casa.windows import WindowLayout

LARGE = torch.cuda.is_available()  # a rehearsal on a CPU makes do with small shapes


def packed(images, texts, **more):
    """One sample of windows opened by an image each."""
    position, places = 0, []
    for image, text in zip(images, texts, strict=True):
        places.append((position, image))
        position += text
    return WindowLayout.from_insertions([position], [places], **more)


def many(number, image, text):
    """As they are on a GPU, and a twentieth in a rehearsal."""
    return (number, image, text) if LARGE else (min(number, 3), 1 + image // 20, 1 + text // 20)


def paper():
    number, image, text = many(16, 1280, 128)
    return packed([image] * number, [text] * number)


def ragged():
    number, image, text = many(12, 700, 90)
    texts = [1 + (31 * n) % text for n in range(number)]
    return packed([1 + (97 * n) % image for n in range(number)], texts)


def odd():
    """63, 1 and 0 tokens; text without images; an image behind all text; a sample of nothing."""
    places = [[(0, 63)], [(0, 1), (1, 64), (1, 63)], [], [(5, 65)], [(0, 3), (7, 9)], []]
    return WindowLayout.from_insertions([63, 65, 31, 6, 7, 0], places)


def inside():
    """Images in the middle of windows."""
    _, image, text = many(1, 300, 200)
    places = [[(0, image), (text // 3, image + 1), (text // 2, 5), (text, image)], [(1, 2)]]
    return WindowLayout.from_insertions([text, 3], places, split="sample")


def history(kept):
    number, image, text = many(6, 200, 40)
    return packed([image + n for n in range(number)], [text + n for n in range(number)], history=kept)


def decode():
    """One new token per row, of rows of different lengths."""
    number, image, text = many(24, 1024, 32)
    lengths = [1 + (7 * n) % text for n in range(number)]
    places = [[(0, image - n)] for n in range(number)]
    return WindowLayout.from_insertions(lengths, places, past=[length - 1 for length in lengths])


def frames():
    """A later call with several new tokens: some rows go on with their image, one has a new one."""
    _, image, _ = many(1, 1024, 1)
    places = [[(0, image)], [(0, image), (20, image)], [(0, image)]]
    return WindowLayout.from_insertions([20, 23, 9], places, past=[15, 20, 9])


LAYOUTS = {
    "paper": paper,
    "ragged": ragged,
    "odd": odd,
    "inside": inside,
    "history 1": lambda: history(1),
    "history all": lambda: history(-1),
    "decode": decode,
    "frames": frames,
}
HEADS = {"16 on 2, 128 wide": (16, 2, 128), "6 on 3, 80 wide": (6, 3, 80)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("output", "query", "text_key", "text_value", "image_key", "image_value")


def given(layout, heads, dtype, device):
    Hq, Hkv, D = heads
    generator = torch.Generator().manual_seed(0)
    sizes = [(layout.num_query, Hq), *[(layout.num_text, Hkv)] * 2, *[(layout.num_image, Hkv)] * 2]
    return [torch.randn(*size, D, generator=generator).to(device, dtype) for size in sizes]


def outcome(tensors, layout, dtype=None, **more):
    """Output and gradients, computed in `dtype` from tensors that are already rounded."""
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors]
    out = casa_attention(*leaves, layout, **more)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def forward_only(tensors, layout, dtype=None, **more):
    with torch.no_grad():
        return [casa_attention(*(t.to(dtype or t.dtype) for t in tensors), layout, **more)]


def rotate(key, delta):
    """As rotary positions do it: halves of the channels turned by delta times a frequency of their own."""
    half = key.shape[-1] // 2
    angle = delta * 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=key.device) / half)
    cos, sin = angle.cos().to(key.dtype), angle.sin().to(key.dtype)
    one, two = key.split(half, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def able(impl, layout, heads, dtype, device, attend, turning, backward):
    """Whether the implementation does this; on a GPU, for what it refuses there is one good reason each."""
    reason = refusal(impl, AttentionRequest(layout, dtype, device, heads[2], attend, turning, backward))
    if device.type == "cuda":
        expected = (impl == "varlen" and dtype == torch.float32) or (impl == "flex" and turning)
        assert (reason is not None) == expected, reason
    return reason is None


def compiles_too_much(shape, heads, dtype, attend, backward):
    """flex takes seconds for each size, head width and dtype: each of these is tried, but not all with all."""
    if shape != "odd" and (heads != HEADS["16 on 2, 128 wide"] or attend == "image"):
        return True
    return dtype == torch.float16 or backward == (shape in ("decode", "frames"))


@pytest.mark.parametrize("impl", [name for name in implementations() if name != "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", LAYOUTS)
def test_no_worse_than_plain_torch(device, no_worse, shape, heads, dtype, impl):
    layout = LAYOUTS[shape]()
    turns = (None, rotate) if layout.history else (None,)
    tensors = given(layout, heads, dtype, device)
    tried = 0
    for attend in ("both", "image"):
        for turn in turns:
            for run, backward in ((outcome, True), (forward_only, False)):
                if not able(impl, layout, heads, dtype, device, attend, turn is not None, backward):
                    continue
                # compiling on a CPU is tried in tests/attention
                if impl == "flex" and (not LARGE or compiles_too_much(shape, heads, dtype, attend, backward)):
                    continue
                more = {"attend": attend, "turn": turn}
                truth = run(tensors, layout, torch.float64, impl="reference", **more)
                plain = run(tensors, layout, impl="reference", **more)
                fast = run(tensors, layout, impl=impl, **more)
                for name, mine, theirs, exact in zip(NAMES, fast, plain, truth, strict=False):
                    no_worse(mine, theirs, exact, f"{name} ({attend}, {'turned' if turn else 'as it is'})")
                tried += 1
    if not tried:
        pytest.skip(f"{impl} does not do {dtype} on {device.type}, or takes too long to compile")


@pytest.mark.parametrize("impl", ["sdpa", "flex", "varlen"])
def test_what_sees_nothing_is_zero_and_nan_stays_in_its_window(device, impl):
    dtype = torch.bfloat16
    layout = WindowLayout.from_insertions([40, 50, 60], [[(10, 20)], [(0, 30)], [(60, 5)]])
    if not able(impl, layout, (4, 2, 32), dtype, device, "image", turning=False, backward=True):
        pytest.skip(f"{impl} needs a GPU for this")
    tensors = given(layout, (4, 2, 32), dtype, device)
    out, *grads = outcome(tensors, layout, impl=impl, attend="image")
    assert not out[:10].any()
    assert not out[90:].any()
    assert out[10:90].any()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:10].any()
    # flex multiplies masked entries of the same block of keys by zero, as the dense mask does
    if impl == "flex":
        return
    for tensor in tensors[:3]:
        tensor[40:90] = torch.nan
    for tensor in tensors[3:]:
        tensor[20:50] = torch.nan
    sick = outcome(tensors, layout, impl=impl)[0]
    assert sick[40:90].isnan().all()
    assert sick[:40].isfinite().all()
    assert sick[90:].isfinite().all()


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("dtype", "backward", "name"),
    [
        (torch.bfloat16, True, "varlen"),
        (torch.float16, False, "varlen"),
        (torch.float32, True, "flex"),
        (torch.float32, False, "sdpa"),
        (torch.float64, True, "sdpa"),
    ],
)
def test_auto_takes_what_the_gpu_has(device, dtype, backward, name):
    layout = packed([200, 100], [30, 40])
    assert choose(AttentionRequest(layout, dtype, device, 64, "both", turning=False, backward=backward)) == name
    tensors = [t.requires_grad_(backward) for t in given(layout, (4, 2, 64), dtype, device)]
    assert torch.equal(casa_attention(*tensors, layout), casa_attention(*tensors, layout, impl=name))


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("impl", ["flex", "varlen"])
def test_no_scores_of_everything_are_stored(device, impl):
    """The paper's batch: dense scores of 16 heads would be 1.5 GB in bfloat16, the tensors themselves are 32 MB."""
    layout = paper()
    leaves = [t.requires_grad_() for t in given(layout, (16, 2, 128), torch.bfloat16, device)]
    casa_attention(*leaves, layout, impl=impl).sum().backward()  # plans, compiles
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    casa_attention(*leaves, layout, impl=impl).sum().backward()
    torch.cuda.synchronize()
    # copies of keys and values, and their gradients, once for each of 16 query heads in varlen's backward
    assert torch.cuda.max_memory_allocated() - before < 600e6


@pytest.mark.usefixtures("real")
def test_flex_compiles_more_sizes_than_torch_does_by_itself(device, no_worse):
    for power in range(7, 17):
        layout = packed([(1 << power) - 40], [40])
        tensors = given(layout, (4, 2, 64), torch.bfloat16, device)
        truth = forward_only(tensors, layout, torch.float64, impl="reference")[0]
        plain = forward_only(tensors, layout, impl="reference")[0]
        no_worse(forward_only(tensors, layout, impl="flex")[0], plain, truth, f"{1 << power} keys")
