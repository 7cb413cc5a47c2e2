"""Times a forward and a backward pass: by the host's clock on a CPU, by the GPU's own events on CUDA.

On CUDA the queue is first filled with a few milliseconds of other work, so that the GPU never waits for the host
in the middle of what is timed; that work overwrites the L2 cache, so that inputs come from memory, as in a model.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU there is
FLUSHES = 48  # of about 0.06 ms on an H200


class Times(NamedTuple):
    """Milliseconds. host: until the forward call returned, its work only queued on CUDA (there, it can hide)."""

    forward: float
    both: float | None
    host: float


class Clock:
    """`Clock(device).time(run, leaves, upstream)`; upstream None leaves out the backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def time(self, run: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor | None) -> tuple[Tensor, Times]:
        """The output, detached, and how long it took."""
        with torch.set_grad_enabled(upstream is not None):
            return self._cuda(run, leaves, upstream) if self.cuda else self._host(run, leaves, upstream)

    def _host(self, run: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor | None) -> tuple[Tensor, Times]:
        begin = time.perf_counter()
        out = run(*leaves)
        forward = time.perf_counter() - begin
        both = None
        if upstream is not None:
            out.backward(upstream)
            both = time.perf_counter() - begin
        return out.detach(), Times(forward * 1e3, None if both is None else both * 1e3, forward * 1e3)

    def _cuda(self, run: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor | None) -> tuple[Tensor, Times]:
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(self.device)
        for _ in range(FLUSHES):
            self._flush.zero_()
        begin.record()
        called = time.perf_counter()
        out = run(*leaves)
        host = (time.perf_counter() - called) * 1e3
        middle.record()
        if upstream is not None:
            out.backward(upstream)
        end.record()
        torch.cuda.synchronize(self.device)
        both = None if upstream is None else begin.elapsed_time(end)
        return out.detach(), Times(begin.elapsed_time(middle), both, host)
