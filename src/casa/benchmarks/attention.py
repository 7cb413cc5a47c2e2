"""Times the attention implementations beside what one would write without them, interleaved in one run.

Every repeat runs every contestant once on the same tensors, so that a busy machine slows all alike; medians
and their ratios are what to read. Times are milliseconds: forward with the graph recorded, and forward +
backward. What an implementation refuses is left out, and its row says why: on a CPU flex has no backward, and is timed
without a graph where there is a compiler. On a CPU the shapes are small and float32; on CUDA they are the paper's, in
bfloat16, with decode steps (one query per window, forward only), and rows say how much of the GPU is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from casa.attention import casa_attention, implementations
from casa.attention.common import AttentionRequest
from casa.attention.dispatch import refusal
from casa.benchmarks.attention_rivals import Rival, concatenated_varlen, dense_mask, flex_attention
from casa.benchmarks.attention_shapes import CUDA_SHAPES, SHAPES, BenchShape
from casa.benchmarks.clock import Clock, Times
from casa.errors import UserError
from casa.provenance import provenance
from casa.windows import WindowLayout

DENSE = "dense mask"


@dataclass(frozen=True)
class BenchSetup:
    """What is timed on a kind of device where nothing else is asked for."""

    shapes: tuple[BenchShape, ...]
    impls: tuple[str, ...]
    rivals: tuple[str, ...]
    dtype: torch.dtype
    query_heads: int
    key_heads: int
    width: int


RIVALS = {DENSE: dense_mask, "varlen, concatenated": concatenated_varlen, "FlexAttention": flex_attention}
SETUPS = {
    "cpu": BenchSetup(SHAPES, ("reference", "sdpa", "flex"), (DENSE,), torch.float32, 8, 2, 64),
    "cuda": BenchSetup(CUDA_SHAPES, ("sdpa", "flex", "varlen"), tuple(RIVALS), torch.bfloat16, 16, 2, 128),
}


@dataclass(frozen=True)
class BenchRow:
    """One contestant on one shape. Ratio: how many times faster than the dense mask (median / median).

    None: a decode step has no backward, nothing of the kind on a CPU, or `reason` says why.
    """

    shape: str
    impl: str
    forward_ms: float | None
    both_ms: float | None
    forward_ratio: float | None
    both_ratio: float | None
    forward_tflops: float | None = None  # 1e12 multiplications and additions a second, of visible pairs only
    both_tflops: float | None = None  # the backward has 2.5 times the forward's
    forward_tbps: float | None = None  # 1e12 bytes a second, query, output, seen keys and values once each
    host_ms: float | None = None  # of the forward, until all of it is queued
    difference: float | None = None  # from the dense mask's output, of its largest entry
    reason: str | None = None  # why it was not timed or, where `forward_ms` is there, its backward was not


CUDA_ONLY = ("forward_tflops", "both_tflops", "forward_tbps", "host_ms", "difference")


def bench_attention(
    shapes: Sequence[BenchShape] | None = None,
    impls: Sequence[str] | None = None,
    device: str = "cpu",
    repeats: int = 9,
    seed: int = 0,
    query_heads: int | None = None,
    key_heads: int | None = None,
    width: int | None = None,
) -> list[BenchRow]:
    """Rows for each shape: the rivals first, the dense mask before all, then each implementation.

    What is None is as in SETUPS for the kind of device. Two rounds of warm-up, in which "flex" is compiled. What an
    implementation refuses, its backward or all of a shape, is not timed and its row says why; so does that of a
    contestant that fails on CUDA or in compiling, and the rest goes on.
    Raises UserError for an unknown implementation or fewer than one repeat.
    """
    where = torch.device(device)
    setup = SETUPS["cuda" if where.type == "cuda" else "cpu"]
    impls = setup.impls if impls is None else impls
    for impl in impls:
        if impl not in implementations():
            raise UserError(f"cannot time {impl!r}; known are {', '.join(implementations())}.")
    if repeats < 1:
        raise UserError(f"repeats is {repeats}; give at least 1.")
    Hq, Hkv, D = query_heads or setup.query_heads, key_heads or setup.key_heads, width or setup.width
    clock = Clock(where)
    rows = []
    for shape in setup.shapes if shapes is None else shapes:
        layout = shape.layout(seed)
        sizes = [(layout.num_query, Hq), *[(layout.num_text, Hkv)] * 2, *[(layout.num_image, Hkv)] * 2]
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(*size, D, generator=generator).to(where, setup.dtype) for size in sizes]
        race = _Race(layout, tensors, clock, trained=shape.queries is None)
        race.run(setup.rivals, impls, repeats)
        rows += race.rows(shape.name, _work(layout, Hq, Hkv, D, tensors[0].element_size()) if clock.cuda else None)
    return rows


class _Race:
    """All contestants on one shape."""

    def __init__(self, layout: WindowLayout, tensors: list[Tensor], clock: Clock, trained: bool) -> None:
        self.layout, self.tensors, self.clock, self.trained = layout, tensors, clock, trained
        self.times: dict[str, list[Times]] = {}
        self.difference: dict[str, float] = {}
        self.reason: dict[str, str] = {}
        self.forward_only: set[str] = set()

    def run(self, rivals: Sequence[str], impls: Sequence[str], repeats: int) -> None:
        contestants: dict[str, Rival] = {}
        for name in rivals:
            with self._guard(name):
                contestants[name] = RIVALS[name](self.layout, self.clock.device)
        contestants |= {impl: partial(casa_attention, layout=self.layout, impl=impl) for impl in impls}
        self.times |= {name: [] for name in contestants}
        for impl in impls:
            self._hear(impl)
        wanted: Tensor | None = None
        for repeat in range(-2, repeats):
            for name, run in contestants.items():
                if name in self.reason and name not in self.forward_only:
                    continue
                with self._guard(name):
                    out = self._once(name, run, counts=repeat >= 0)
                    if repeat == -2:
                        wanted = out if name == DENSE else wanted
                        if wanted is not None:
                            self.difference[name] = float((out - wanted).abs().max() / wanted.abs().max())

    def _hear(self, impl: str) -> None:
        """Notes what the implementation refuses: its backward, or all of it."""
        query = self.tensors[0]
        forward = AttentionRequest(
            self.layout, query.dtype, query.device, query.shape[-1], "both", turning=False, backward=False
        )
        if (reason := refusal(impl, forward)) is not None:
            self.reason[impl] = reason
        elif self.trained and (reason := refusal(impl, replace(forward, backward=True))) is not None:
            self.reason[impl] = reason
            self.forward_only.add(impl)

    def _once(self, name: str, run: Rival, counts: bool) -> Tensor:
        backward = self.trained and name not in self.forward_only
        leaves = [tensor.detach().requires_grad_(backward) for tensor in self.tensors]
        out, times = self.clock.time(run, leaves, torch.ones_like(self.tensors[0]) if backward else None)
        if counts:
            self.times[name].append(times)
        return out

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """A GPU is seldom at hand, and compilers vary: one that fails there does not cost the others their turn."""
        try:
            yield
        except Exception as error:
            if not self.clock.cuda and name != "flex":
                raise
            said = str(error).strip().splitlines() or [""]
            self.reason[name] = f"{type(error).__name__}: {said[0]}"
            self.forward_only.discard(name)
            self.times[name] = []

    def rows(self, shape: str, work: tuple[float, float] | None) -> list[BenchRow]:
        """work: floating-point operations and bytes of a forward pass."""
        dense_forward, dense_both = _medians(self.times[DENSE])
        rows = []
        for name, times in self.times.items():
            forward, both = _medians(times)
            ratios = _over(dense_forward, forward), _over(dense_both, both)
            row = BenchRow(shape, name, forward, both, *ratios, reason=self.reason.get(name))
            if work is not None:
                flops, moved = work
                row = replace(
                    row,
                    # operations per millisecond, in units of 1e12 a second
                    forward_tflops=_over(flops / 1e9, forward),
                    both_tflops=_over(3.5 * flops / 1e9, both),
                    forward_tbps=_over(moved / 1e9, forward),
                    host_ms=median(t.host for t in times) if times else None,
                    difference=self.difference.get(name),
                )
            rows.append(row)
        return rows


def _medians(times: Sequence[Times]) -> tuple[float | None, float | None]:
    both = [t.both for t in times if t.both is not None]
    return median(t.forward for t in times) if times else None, median(both) if both else None


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


def bench_table(rows: Sequence[BenchRow]) -> str:
    """The rows as aligned text, one block per shape; on CUDA with what they reach of the GPU.

    Below them, why some were timed forward only.
    """
    cuda = any(row.host_ms is not None for row in rows)
    lines = [f"{'':28}{'ms':>10}{'ms':>12}{'times faster than dense':>28}"]
    lines.append(f"{'':28}{'forward':>10}{'+ backward':>12}{'forward':>14}{'+ backward':>14}")
    if cuda:
        lines[0] += f"{'TFLOP/s':>12}{'TFLOP/s':>12}{'TB/s':>9}{'ms':>9}{'differs':>10}"
        lines[1] += f"{'forward':>12}{'+ backward':>12}{'forward':>9}{'host':>9}{'by':>10}"
    shape = None
    for row in rows:
        if row.shape != shape:
            lines.append(f"\n{row.shape}")
            shape = row.shape
        if row.forward_ms is None:
            lines.append(f"  {row.impl:26}not timed: {row.reason}")
            continue
        digits = 3 if cuda else 1
        line = f"  {row.impl:26}{_cell(row.forward_ms, 10, digits)}{_cell(row.both_ms, 12, digits)}"
        line += f"{_cell(row.forward_ratio, 14, 1, 'x')}{_cell(row.both_ratio, 14, 1, 'x')}"
        if cuda:
            line += f"{_cell(row.forward_tflops, 12, 1)}{_cell(row.both_tflops, 12, 1)}{_cell(row.forward_tbps, 9, 2)}"
            line += f"{_cell(row.host_ms, 9, 3)}{_cell(row.difference, 10, 4)}"
        lines.append(line)
    halves = dict.fromkeys((row.impl, row.reason) for row in rows if row.forward_ms is not None and row.reason)
    lines += [f"\n{impl}, forward only: {reason}" for impl, reason in halves]
    return "\n".join(lines)


def _cell(value: float | None, width: int, digits: int, unit: str = "") -> str:
    return f"{'none' if value is None else f'{value:.{digits}f}{unit}':>{width}}"


def bench_record(rows: Sequence[BenchRow], seed: int, repeats: int, device: str = "cpu") -> dict:
    """The rows with what is needed to trace them: plain numbers and strings, ready for JSON."""
    cuda = device.startswith("cuda")
    setup = SETUPS["cuda"]
    heads = {"dtype": str(setup.dtype), "heads": [setup.query_heads, setup.key_heads, setup.width]} if cuda else {}
    return {
        "bench": "attention",
        **provenance(device),
        "seed": seed,
        "repeats": repeats,
        **heads,
        "rows": [{k: v for k, v in asdict(row).items() if cuda or k not in CUDA_ONLY} for row in rows],
    }
