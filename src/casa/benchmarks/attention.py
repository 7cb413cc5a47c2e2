"""Times the attention implementations beside one dense mask over everything, interleaved in one run.

Every repeat runs every contestant once on the same tensors, so that a busy machine slows all alike; medians
and their ratios are what to read. Times are milliseconds: forward with the graph recorded, and forward +
backward.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention import casa_attention, implementations
from casa.errors import UserError
from casa.provenance import provenance
from casa.windows import WindowLayout

DENSE = "dense mask"
BACKWARD_TOO = ("reference", "sdpa")


@dataclass(frozen=True)
class BenchShape:
    """`windows` windows of one image of `image` tokens and `text[0]`..`text[1]` text tokens each."""

    name: str
    windows: int
    image: int
    text: tuple[int, int]

    def layout(self, seed: int) -> WindowLayout:
        chance = random.Random(seed)
        position, insertions = 0, []
        for _ in range(self.windows):
            insertions.append((position, self.image))
            position += chance.randint(*self.text)
        return WindowLayout.from_insertions([position], [insertions])


SHAPES = (
    BenchShape("64 x (64 + 16)", 64, 64, (16, 16)),
    BenchShape("16 x (256 + 64)", 16, 256, (64, 64)),
    BenchShape("8 x (1024 + 128)", 8, 1024, (128, 128)),
    BenchShape("ragged 16 x (256 + 4..90)", 16, 256, (4, 90)),
)


@dataclass(frozen=True)
class BenchRow:
    """One contestant on one shape. Ratio: how many times faster than the dense mask (median / median)."""

    shape: str
    impl: str
    forward_ms: float
    both_ms: float | None  # None: no backward on this device
    forward_ratio: float
    both_ratio: float | None


def bench_attention(
    shapes: Sequence[BenchShape] = SHAPES,
    impls: Sequence[str] = BACKWARD_TOO,
    device: str = "cpu",
    repeats: int = 9,
    seed: int = 0,
    query_heads: int = 8,
    key_heads: int = 2,
    width: int = 64,
) -> list[BenchRow]:
    """Rows for each shape: the dense mask first, then each implementation. float32, two rounds of warm-up.

    impls: names known to `casa_attention`; "flex" is compiled on its first round, and on a CPU timed forward
        only.
    Raises UserError for an unknown implementation or fewer than one repeat.
    """
    for impl in impls:
        if impl not in implementations():
            raise UserError(f"cannot time {impl!r}; known are {', '.join(implementations())}.")
    if repeats < 1:
        raise UserError(f"repeats is {repeats}; give at least 1.")
    rows = []
    for shape in shapes:
        layout = shape.layout(seed)
        heads = {"query": (layout.num_query, query_heads)}
        heads |= dict.fromkeys(("text_key", "text_value"), (layout.num_text, key_heads))
        heads |= dict.fromkeys(("image_key", "image_value"), (layout.num_image, key_heads))
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(*size, width, generator=generator).to(device) for size in heads.values()]
        rows += _rows(shape.name, _time(layout, tensors, impls, repeats))
    return rows


def _time(
    layout: WindowLayout, tensors: list[Tensor], impls: Sequence[str], repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of each repeat, (forward, forward + backward), by contestant."""
    mask = layout.mask(tensors[0].device)
    contestants: dict[str, Callable[..., Tensor]] = {DENSE: partial(_dense, mask=mask)}
    for impl in impls:
        contestants[impl] = partial(casa_attention, layout=layout, impl=impl)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    for repeat in range(-2, repeats):
        for name, run in contestants.items():
            trained = not (name == "flex" and tensors[0].device.type == "cpu")
            leaves = [t.detach().requires_grad_(trained) for t in tensors]
            upstream = torch.ones_like(tensors[0])
            begin = _now(leaves[0])
            out = run(*leaves)
            forward = _now(out) - begin
            if trained:
                out.backward(upstream)
                both = _now(leaves[0]) - begin
            if repeat >= 0:
                times[name][0].append(forward * 1e3)
                if trained:
                    times[name][1].append(both * 1e3)
    return times


def _rows(shape: str, times: dict[str, tuple[list[float], list[float]]]) -> list[BenchRow]:
    dense_forward, dense_both = (median(t) for t in times[DENSE])
    rows = []
    for name, (forward, both) in times.items():
        half, full = median(forward), median(both) if both else None
        ratio = dense_both / full if full else None
        rows.append(BenchRow(shape, name, half, full, dense_forward / half, ratio))
    return rows


def _dense(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, mask: Tensor) -> Tensor:
    """One call over all text and images: (T, Hq, D) under a bool mask (T, N + T)."""
    key, value = torch.cat([image_k, text_k]), torch.cat([image_v, text_v])
    query, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None], enable_gqa=True)
    return out[0].transpose(0, 1)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def bench_table(rows: Sequence[BenchRow]) -> str:
    """The rows as aligned text, one block per shape."""
    lines = [f"{'':28}{'ms':>10}{'ms':>12}{'times faster than dense':>28}"]
    lines.append(f"{'':28}{'forward':>10}{'+ backward':>12}{'forward':>14}{'+ backward':>14}")
    shape = None
    for row in rows:
        if row.shape != shape:
            lines.append(f"\n{row.shape}")
            shape = row.shape
        both = "none" if row.both_ms is None else f"{row.both_ms:.1f}"
        ratio = "none" if row.both_ratio is None else f"{row.both_ratio:.1f}x"
        lines.append(f"  {row.impl:26}{row.forward_ms:10.1f}{both:>12}{row.forward_ratio:13.1f}x{ratio:>14}")
    return "\n".join(lines)


def bench_record(rows: Sequence[BenchRow], seed: int, repeats: int, device: str = "cpu") -> dict:
    """The rows with what is needed to trace them: plain numbers and strings, ready for JSON."""
    return {
        "bench": "attention",
        **provenance(device),
        "seed": seed,
        "repeats": repeats,
        "rows": [asdict(row) for row in rows],
    }
