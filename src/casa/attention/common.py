"""What implementations of attention share: a call's inputs, and rows gathered from packed tensors by index.

Shapes as in dispatch.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from casa.windows import WindowLayout

TurnKeys = Callable[[Tensor, int], Tensor]
"""Keys (n, Hkv, D) of an earlier window, and how many text tokens further back its start lies (negative). If it has a
method `each(keys, distances)`, int64 (n,), that is called once for the keys of all windows."""


@dataclass(frozen=True)
class AttentionRequest:
    """What a call asks for besides its numbers: enough for an implementation's `refusal` to say whether it can do it.

    Attributes:
        width: D.
        turning: Keys of earlier windows are to be turned.
        backward: A gradient is wanted.
    """

    layout: WindowLayout
    dtype: torch.dtype
    device: torch.device
    width: int
    attend: str
    turning: bool
    backward: bool


@dataclass(frozen=True)
class AttentionInputs:
    """The checked arguments of `casa_attention`, as implementations take them."""

    query: Tensor
    text_key: Tensor
    text_value: Tensor
    image_key: Tensor
    image_value: Tensor
    layout: WindowLayout
    scale: float
    attend: str = "both"
    turn: TurnKeys | None = None

    @property
    def turning(self) -> bool:
        return self.turn is not None and self.layout.history != 0

    @property
    def keys(self) -> list[Tensor]:
        """Image keys, then text keys where text is attended to."""
        return [self.image_key, self.text_key] if self.attend == "both" else [self.image_key]

    @property
    def values(self) -> list[Tensor]:
        return [self.image_value, self.text_value] if self.attend == "both" else [self.image_value]

    def turned_keys(self, copies: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """Image keys of windows, each turned: `copies` holds (window, delta)."""
        if self.turn is None or not copies:
            return []
        device = self.image_key.device
        if (each := getattr(self.turn, "each", None)) is None:
            images = self.image_key.split([window.num_image for window in self.layout.windows])
            return [self.turn(images[window], delta) for window, delta in copies]
        device = self.image_key.device
        gather, distances = self.layout.cached(("turned", copies, device), lambda: self._turns(copies, device))
        return [each(gather(self.image_key), distances)]

    def _turns(self, copies: tuple[tuple[int, int], ...], device: torch.device) -> "tuple[RowGather, Tensor]":
        """The image rows that are copied, and int64 (n,), how far each is turned."""
        windows = self.layout.windows
        rows = [torch.arange(windows[window].image_start, windows[window].image_stop) for window, _ in copies]
        distances = [torch.full((windows[window].num_image,), delta) for window, delta in copies]
        index = torch.cat(rows)
        gather = RowGather.of(index, torch.ones_like(index, dtype=torch.bool), self.layout.num_image)
        return gather.to(device), torch.cat(distances).to(device)

    def request(self) -> AttentionRequest:
        tensors = (self.query, self.text_key, self.text_value, self.image_key, self.image_value)
        return AttentionRequest(
            layout=self.layout,
            dtype=self.query.dtype,
            device=self.query.device,
            width=self.query.shape[-1],
            attend=self.attend,
            turning=self.turning,
            backward=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        )


@dataclass(frozen=True)
class RowGather:
    """`gather(x)[i] = x[index[i]]`, zeros at `blank`; only valid rows hand a gradient back.

    The backward of torch's own `index_select` adds one row at a time, which on a CPU takes longer than the attention
    it feeds. Which rows were gathered from which source row is known beforehand, so the gradient is gathered too.
    """

    index: Tensor  # int64 (M,)
    blank: Tensor  # int64: rows of the result that are zeros
    first: Tensor  # int64 (n,): for each source row, a result row made of it
    unused: Tensor  # int64: source rows without one
    repeats: tuple[tuple[Tensor, Tensor], ...]  # (source rows, result rows) of second, third, ... uses
    is_same: bool = False  # every row where it was, as in a prompt of one window

    @staticmethod
    def of(index: Tensor, valid: Tensor, sources: int, blank: Tensor | None = None) -> "RowGather":
        """The gather of these rows.

        Args:
            index, valid: (M,), from `sources` rows. The rest is padding, whose gradient is zero.
        """
        used = valid.nonzero().squeeze(1)
        row, order = index[used].sort(stable=True)
        used = used[order]
        use = torch.arange(len(row)) - torch.searchsorted(row, row)  # 0 for a row's first use, 1 for its second
        first = torch.zeros(sources, dtype=torch.int64)
        first[row[use == 0]] = used[use == 0]
        unused = torch.ones(sources, dtype=torch.bool)
        unused[row] = False
        last = int(use.max()) if len(use) else 0
        repeats = tuple((row[use == n], used[use == n]) for n in range(1, last + 1))
        blank = torch.zeros(0, dtype=torch.int64) if blank is None else blank
        is_same = bool(valid.all()) and not len(blank) and torch.equal(index, torch.arange(sources))
        return RowGather(index, blank, first, unused.nonzero().squeeze(1), repeats, is_same)

    def to(self, device: torch.device) -> "RowGather":
        moved = {name: getattr(self, name).to(device) for name in ("index", "blank", "first", "unused")}
        return replace(self, **moved, repeats=tuple((a.to(device), b.to(device)) for a, b in self.repeats))

    def __call__(self, source: Tensor) -> Tensor:
        """(n, ...) -> (M, ...)"""
        return source if self.is_same else _Gathered.apply(source, self)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, gather: RowGather) -> Tensor:  # type: ignore[override]
        ctx.gather = gather
        out = source.index_select(0, gather.index)
        return out.index_fill_(0, gather.blank, 0.0) if len(gather.blank) else out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gather: RowGather = ctx.gather
        out = grad.index_select(0, gather.first)
        if len(gather.unused):
            out = out.index_fill(0, gather.unused, 0.0)
        for rows, uses in gather.repeats:
            more = out.index_select(0, rows) + grad.index_select(0, uses)
            out = out.index_put((rows,), more)
        return out, None


class RowList:
    """Source rows listed in the order in which they are gathered."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._valid: list[Tensor] = []
        self.count = 0

    def add(self, *spans: tuple[int, int]) -> None:
        """Rows start:stop of each span."""
        for start, stop in spans:
            self._append(torch.arange(start, stop), True)

    def pad(self, number: int) -> None:
        """Repeats the last row: of the same window, so that no NaN of another window is multiplied by zero."""
        if number:
            self._append(self._pieces[-1][-1:].expand(number), False)

    def _append(self, rows: Tensor, valid: bool) -> None:
        if len(rows):
            self._pieces.append(rows)
            self._valid.append(torch.full((len(rows),), valid))
            self.count += len(rows)

    def index(self) -> Tensor:
        return torch.cat(self._pieces)

    def gather(self, sources: int) -> RowGather:
        return RowGather.of(self.index(), torch.cat(self._valid), sources)


def joined(rows: list[Tensor]) -> Tensor:
    """The rows of all tensors; those of a single one are not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def bias_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, of the mask's shape: 0 where it is True, and minus infinity elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def zeros_of(x: Tensor) -> Tensor:
    """Zeros like x that still belong to its graph: what queries get that see nothing."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
