"""Times the attention implementations beside what one would write without them: the rivals, a dense mask before all.

Contestants take turns on the same tensors; medians and their ratios are what to read. A row of the result:

    forward_ms, both_ms             forward with the graph recorded, and forward + backward; None for what was not timed
    forward_ratio, both_ratio       how many times faster than the dense mask (median / median)
    reason                          why a contestant, or its backward, was not timed
    forward_tflops, both_tflops     on CUDA: 1e12 multiplications and additions a second, of visible pairs only (the
                                    backward has 2.5 times the forward's)
    forward_tbps                    on CUDA: 1e12 bytes a second: query, output, seen keys and values, once each
    host_ms, difference             on CUDA: until the forward is queued; from the dense mask's output, relative

On a CPU the shapes are small and float32. On CUDA they are the paper's, in bfloat16, and decode steps are among them
(one query per window, forward only).
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention import casa_attention, implementations
from casa.attention.common import AttentionRequest
from casa.attention.dispatch import refusal
from casa.benchmarks.harness import Benchmark, Figures, table
from casa.benchmarks.settings import AttentionSettings
from casa.errors import UserError
from casa.models.auto import pick_device
from casa.windows import WindowLayout

DENSE = "dense mask"
WARM = 2  # rounds that do not count; in the first of them "flex" is compiled
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU there is
FLUSHES = 48  # of about 0.06 ms on an H200


Rival = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A function of (query, text_key, text_value, image_key, image_value), as `casa_attention`."""


def dense_mask(layout: WindowLayout, device: torch.device) -> Rival:
    """One call over all text and images under a bool mask (Q, N + T)."""
    mask = layout.mask(device)[None, None]

    def run(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        key, value = torch.cat([image_k, text_k]), torch.cat([image_v, text_v])
        grouped = q.shape[1] != key.shape[1]
        if device.type == "cuda" and grouped:
            # CUDA's fused kernel that takes a mask knows no groups; without it the scores of all heads are stored
            key, value = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (key, value))
            grouped = False
        query, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return run


def concatenated_varlen(layout: WindowLayout, device: torch.device) -> Rival:
    """Keys and values concatenated window by window in each call, then torch's variable-length kernel."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # keywords vary with torch's version
    windows = [window for window in layout.windows if window.num_query]
    _need_opening_images(layout)

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)

    queries = [window.num_query for window in windows]
    keys = [window.num_image + window.num_text for window in windows]
    query_ends, key_ends = ends(queries), ends(keys)
    # torch 2.11 takes fewer key heads without being told
    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}

    def joined(image: Tensor, text: Tensor) -> Tensor:
        parts = [
            part
            for window in windows
            for part in (image[window.image_start : window.image_stop], text[window.text_start : window.text_stop])
        ]
        return torch.cat(parts)

    def run(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        key, value = joined(image_k, text_k), joined(image_v, text_v)
        return varlen_attn(q, key, value, query_ends, key_ends, max(queries), max(keys), window_size=(-1, 0), **grouped)

    return run


def flex_attention(layout: WindowLayout, device: torch.device) -> Rival:
    """FlexAttention with a document mask, as its documentation shows: sizes as they are, nothing padded."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    _need_opening_images(layout)
    token = layout.on(device, "query_index")
    mine = layout.on(device, "text_window")[token]
    window = torch.cat([layout.on(device, "image_window"), layout.on(device, "text_window")])
    stands = torch.cat([layout.on(device, "image_text_index"), torch.arange(layout.num_text, device=device)])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (window[key] == mine[query]) & (stands[key] <= token[query])

    mask = create_block_mask(sees, None, None, len(token), len(window), device=str(device))
    compiled = torch.compile(attend, dynamic=False)

    def run(q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        key, value = torch.cat([image_k, text_k]), torch.cat([image_v, text_v])
        query, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
        # beyond torch's own bound on sizes it would go on without its kernel, and say nothing
        with config.patch(recompile_limit=64):
            out = compiled(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
        return out[0].transpose(0, 1)

    return run


def _need_opening_images(layout: WindowLayout) -> None:
    opening = all(i.text_position == window.text_start for window in layout.windows for i in window.images)
    if layout.history or not opening:
        raise ValueError("this rival needs images that open their windows, and no history.")


RIVALS: dict[str, Callable[[WindowLayout, torch.device], Rival]] = {
    "dense mask": dense_mask,
    "varlen, concatenated": concatenated_varlen,
    "FlexAttention": flex_attention,
}


@dataclass(frozen=True)
class AttentionShape:
    """`windows` windows of one image of `image` tokens and `text[0]`..`text[1]` text tokens each.

    Attributes:
        queries: How many of a window's text tokens, the last, have a query; None for all, in one packed sample. With a
            number each window is a sample of its own, as rows that decode are.
    """

    name: str
    windows: int
    image: int
    text: tuple[int, int]
    queries: int | None = None

    def layout(self, seed: int) -> WindowLayout:
        chance = random.Random(seed)
        lengths = [chance.randint(*self.text) for _ in range(self.windows)]
        if self.queries is not None:
            past = [length - self.queries for length in lengths]
            return WindowLayout.from_insertions(lengths, [[(0, self.image)]] * self.windows, past=past)
        insertions = [(sum(lengths[:number]), self.image) for number in range(self.windows)]
        return WindowLayout.from_insertions([sum(lengths)], [insertions])


@dataclass(frozen=True)
class Setup:
    """What is timed on a kind of device. heads: of queries and keys, and their width."""

    shapes: tuple[AttentionShape, ...]
    impls: tuple[str, ...]
    rivals: tuple[str, ...]
    dtype: torch.dtype
    heads: tuple[int, int, int]


CPU_SHAPES = (
    AttentionShape("64 x (64 + 16)", 64, 64, (16, 16)),
    AttentionShape("16 x (256 + 64)", 16, 256, (64, 64)),
    AttentionShape("8 x (1024 + 128)", 8, 1024, (128, 128)),
    AttentionShape("ragged 16 x (256 + 4..90)", 16, 256, (4, 90)),
)
CUDA_SHAPES = (
    # the paper's packed batch, 2,048 text and 20,480 image tokens (section 4)
    AttentionShape("packed 16 x (1280 + 128)", 16, 1280, (128, 128)),
    AttentionShape("packed 16 x (1280 + 16..240)", 16, 1280, (16, 240)),
    AttentionShape("packed 128 x (160 + 16)", 128, 160, (16, 16)),
    # a frame of 896 px is 1,024 tokens
    AttentionShape("decode 1 x (1024 + 16)", 1, 1024, (16, 16), queries=1),
    AttentionShape("decode 16 x (1024 + 1..32)", 16, 1024, (1, 32), queries=1),
    AttentionShape("decode 256 x (1024 + 1..32)", 256, 1024, (1, 32), queries=1),
)
SETUPS = {
    "cpu": Setup(CPU_SHAPES, ("reference", "sdpa", "flex"), (DENSE,), torch.float32, (8, 2, 64)),
    "cuda": Setup(CUDA_SHAPES, ("sdpa", "flex", "varlen"), tuple(RIVALS), torch.bfloat16, (16, 2, 128)),
}


def bench_attention(
    settings: AttentionSettings,
    shapes: Sequence[AttentionShape] | None = None,
    heads: tuple[int, int, int] | None = None,
) -> Benchmark:
    """Rows for each shape: the rivals first, then each implementation.

    Shapes and heads are by default those of the device (`SETUPS`). What an implementation refuses, its backward or all
    of a shape, is not timed and its row says why; so does that of a contestant that fails on CUDA or in compiling, and
    the rest goes on.

    Raises:
        UserError: An unknown implementation.
    """
    device = torch.device(pick_device(settings.device))
    setup = SETUPS["cuda" if device.type == "cuda" else "cpu"]
    impls, (Hq, Hkv, D) = settings.impls or setup.impls, heads or setup.heads
    for impl in impls:
        if impl not in implementations():
            raise UserError(f"cannot time {impl!r}; known are {', '.join(implementations())}.")
    clock, rows = Clock(device), []
    for shape in shapes or setup.shapes:
        layout = shape.layout(settings.seed)
        sizes = [(layout.num_query, Hq), *[(layout.num_text, Hkv)] * 2, *[(layout.num_image, Hkv)] * 2]
        generator = torch.Generator().manual_seed(settings.seed)
        tensors = [torch.randn(*size, D, generator=generator).to(device, setup.dtype) for size in sizes]
        trained = shape.queries is None
        contestants = [Contestant.rival(name, layout, clock, trained) for name in setup.rivals]
        contestants += [Contestant.of_casa(impl, layout, clock, trained, tensors[0]) for impl in impls]
        race(contestants, tensors, settings.repeats)
        work = _work(layout, Hq, Hkv, D, size=tensors[0].element_size()) if clock.cuda else None
        rows += [{"shape": shape.name, "impl": one.name, **one.figures(contestants[0], work)} for one in contestants]
    told: Figures = {"seed": settings.seed, "repeats": settings.repeats}
    if clock.cuda:
        told |= {"dtype": str(setup.dtype), "heads": [Hq, Hkv, D]}
    return Benchmark("attention", told, {"rows": rows}, attention_table(rows), str(device))


class Times(NamedTuple):
    """Milliseconds. host: until the forward call returned, its work only queued on CUDA (there, it can hide)."""

    forward: float
    both: float | None
    host: float


class Clock:
    """Times a forward and a backward pass: by the host's clock on a CPU, by the GPU's own events on CUDA.

    On CUDA the queue is first filled with a few milliseconds of other work, so that the GPU never waits for the host
    in the middle of what is timed; that work overwrites the L2 cache, so that inputs come from memory, as in a model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def time(self, run: Rival, leaves: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, Times]:
        """The output, detached, and how long it took. upstream None leaves out the backward."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if self._flush.numel() else []
        host = []

        def mark() -> None:
            if events:
                events[len(host)].record()
            host.append(1e3 * time.perf_counter())

        with torch.set_grad_enabled(upstream is not None):
            if events:
                torch.cuda.synchronize(self.device)
                for _ in range(FLUSHES):
                    self._flush.zero_()
            mark()
            out = run(*leaves)
            mark()
            if upstream is not None:
                out.backward(upstream)
            mark()
        if events:
            torch.cuda.synchronize(self.device)
        forward, both = (events[0].elapsed_time(events[end]) if events else host[end] - host[0] for end in (1, 2))
        return out.detach(), Times(forward, None if upstream is None else both, host[1] - host[0])


@dataclass
class Contestant:
    """One of those that are timed on a shape. run None: it is not timed at all."""

    name: str
    clock: Clock
    trained: bool
    run: Rival | None = None
    reason: str | None = None
    times: list[Times] = field(default_factory=list)
    difference: float | None = None  # from the dense mask's output, of its largest entry

    @classmethod
    def rival(cls, name: str, layout: WindowLayout, clock: Clock, trained: bool) -> "Contestant":
        made = cls(name, clock, trained)
        with made.guard():
            made.run = RIVALS[name](layout, clock.device)
        return made

    @classmethod
    def of_casa(cls, impl: str, layout: WindowLayout, clock: Clock, trained: bool, query: Tensor) -> "Contestant":
        forward = AttentionRequest(
            layout, query.dtype, query.device, query.shape[-1], "both", turning=False, backward=False
        )
        if (reason := refusal(impl, forward)) is not None:
            return cls(impl, clock, trained, reason=reason)
        if trained:
            reason = refusal(impl, replace(forward, backward=True))
        run = partial(casa_attention, layout=layout, impl=impl)
        return cls(impl, clock, trained and reason is None, run, reason)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A GPU is seldom at hand, and compilers vary: one that fails there does not cost the others their turn."""
        try:
            yield
        except Exception as error:
            if not self.clock.cuda and self.name != "flex":
                raise
            said = str(error).strip().splitlines() or [""]
            self.run, self.times, self.reason = None, [], f"{type(error).__name__}: {said[0]}"

    def once(self, tensors: Sequence[Tensor], counts: bool) -> Tensor | None:
        with self.guard():
            if self.run is not None:
                leaves = [tensor.detach().requires_grad_(self.trained) for tensor in tensors]
                out, times = self.clock.time(self.run, leaves, torch.ones_like(tensors[0]) if self.trained else None)
                if counts:
                    self.times.append(times)
                return out
        return None

    def figures(self, dense: "Contestant", work: tuple[float, float] | None) -> Figures:
        """The shape's figures as they stand in the result.

        Args:
            work: Floating-point operations and bytes of a forward pass, on CUDA.
        """
        forward, both = self.medians()
        others = dense.medians()
        found: Figures = {"forward_ms": forward, "both_ms": both}
        found |= {"forward_ratio": _over(others[0], forward), "both_ratio": _over(others[1], both)}
        if work is not None:
            # operations per millisecond, in units of 1e12 a second
            found |= {"forward_tflops": _over(work[0] / 1e9, forward), "both_tflops": _over(3.5 * work[0] / 1e9, both)}
            found |= {"forward_tbps": _over(work[1] / 1e9, forward), "difference": self.difference}
            found["host_ms"] = median(t.host for t in self.times) if self.times else None
        return found | {"reason": self.reason}

    def medians(self) -> tuple[float | None, float | None]:
        both = [t.both for t in self.times if t.both is not None]
        return median(t.forward for t in self.times) if self.times else None, median(both) if both else None


def race(contestants: Sequence[Contestant], tensors: Sequence[Tensor], repeats: int) -> None:
    """Everyone once in each round, in turns; the first one's output is what the others' are compared with."""
    wanted: Tensor | None = None
    for repeat in range(-WARM, repeats):
        for one in contestants:
            out = one.once(tensors, counts=repeat >= 0)
            if repeat == -WARM and out is not None:
                wanted = out if wanted is None else wanted
                one.difference = float((out - wanted).abs().max() / wanted.abs().max())


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _work(layout: WindowLayout, Hq: int, Hkv: int, D: int, size: int) -> tuple[float, float]:
    """What a forward pass cannot do without: operations on visible pairs, and bytes of each tensor once."""
    pairs = keys = 0
    for number, window in enumerate(layout.windows):
        earlier = sum(layout.windows[other].num_image for other in layout.visible_windows(number)[:-1])
        for token in range(window.query_start, window.text_stop):
            own = sum(i.stop - i.start for i in window.images if i.text_position <= token)
            pairs += earlier + own + token - window.text_start + 1
        keys += window.num_image + window.num_text if window.num_query else 0
    return 4.0 * pairs * Hq * D, 2.0 * size * D * (layout.num_query * Hq + keys * Hkv)


def attention_table(rows: Sequence[Figures]) -> str:
    """One block per shape; on CUDA with what is reached of the GPU. Below, why some were not timed or forward only."""
    cuda = "host_ms" in rows[0]
    ms = ".3f" if cuda else ".1f"
    columns = {"": "{impl}", "forward, ms": f"{{forward_ms:{ms}}}", "+ backward": f"{{both_ms:{ms}}}"}
    columns |= {"times faster": "{forward_ratio:.1f}x", "+ backward ": "{both_ratio:.1f}x"}
    if cuda:
        columns |= {
            "TFLOP/s": "{forward_tflops:.1f}",
            "+ backward  ": "{both_tflops:.1f}",
            "TB/s": "{forward_tbps:.2f}",
        }
        columns |= {"host, ms": "{host_ms:.3f}", "differs by": "{difference:.4f}"}
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        lines += [f"\n{shape}", table([row for row in rows if row["shape"] == shape], columns)]
    told = {(row["impl"], row["reason"], row["forward_ms"] is None) for row in rows if row["reason"]}
    lines += [f"{impl}, {'not timed' if out else 'forward only'}: {reason}" for impl, reason, out in sorted(told)]
    return "\n".join(lines).lstrip("\n")
