"""Rows picked out of a packed tensor by index, with a backward that picks too instead of adding row by row.

torch's own backward of `index_select` adds one row at a time, which on a CPU takes longer than the attention
it feeds. Which picked rows came from which source row is known beforehand, so the gradient is gathered.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pick:
    """`pick(x)[i] = x[index[i]]`, zeros at `blank`; only rows with `valid` hand a gradient back."""

    index: Tensor  # int64 (M,)
    blank: Tensor  # int64: rows of the result that are zeros
    first: Tensor  # int64 (n,): for each source row, a result row made of it
    unused: Tensor  # int64: source rows without one
    repeats: tuple[tuple[Tensor, Tensor], ...]  # (source rows, result rows) of second, third, ... uses

    @staticmethod
    def of(index: Tensor, valid: Tensor, sources: int, blank: Tensor | None = None) -> "Pick":
        """index, valid: (M,), from `sources` rows. The rest is padding, whose gradient is zero."""
        used = valid.nonzero().squeeze(1)
        row, order = index[used].sort(stable=True)
        used = used[order]
        turn = torch.arange(len(row)) - torch.searchsorted(row, row)  # 0 for a row's first use, 1 for its second
        fresh = turn == 0
        first = torch.zeros(sources, dtype=torch.int64)
        first[row[fresh]] = used[fresh]
        unused = torch.ones(sources, dtype=torch.bool)
        unused[row] = False
        last = int(turn.max()) if len(turn) else 0
        repeats = tuple((row[turn == n], used[turn == n]) for n in range(1, last + 1))
        nothing = torch.zeros(0, dtype=torch.int64)
        return Pick(index, nothing if blank is None else blank, first, unused.nonzero().squeeze(1), repeats)

    def to(self, device: torch.device) -> "Pick":
        moved = {name: getattr(self, name).to(device) for name in ("index", "blank", "first", "unused")}
        return replace(self, **moved, repeats=tuple((a.to(device), b.to(device)) for a, b in self.repeats))

    def __call__(self, source: Tensor) -> Tensor:
        """(n, ...) -> (M, ...)"""
        return _Picked.apply(source, self)  # type: ignore[no-any-return]


def zeros_of(x: Tensor) -> Tensor:
    """Zeros like x that still belong to its graph: what queries get that see nothing."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, pick: Pick) -> Tensor:  # type: ignore[override]
        ctx.pick = pick
        out = source.index_select(0, pick.index)
        return out.index_fill_(0, pick.blank, 0.0) if len(pick.blank) else out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        pick: Pick = ctx.pick
        out = grad.index_select(0, pick.first)
        if len(pick.unused):
            out = out.index_fill(0, pick.unused, 0.0)
        for rows, uses in pick.repeats:
            more = out.index_select(0, rows) + grad.index_select(0, uses)
            out = out.index_put((rows,), more)
        return out, None
