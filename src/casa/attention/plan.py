"""Which windows share one batched call, decided once per layout by measured cost.

The cost rule. One call takes about `CALL` ns plus `ENTRY` ns for each multiply-add of its padded scores
(windows x queries x keys x Hq x D), forward and backward together. Windows of equal shape share a call for
free; padding a window up to a neighbour's shape pays when the added work costs less than the call it saves.

Milliseconds forward + backward for several values of CALL, in ns (8 and 2 heads, D 64, fp32, one thread of a
2-core machine; number of calls in brackets), from which the value below was chosen:

    windows x (image + text)       0          50,000     150,000    600,000    no limit
    16 x (256 + 4..90)             40.9 (16)  36.3 (13)  39.0 (8)   41.4 (4)   66.0 (1)
    64 x (64 + 4..28)              23.5 (22)  23.5 (8)   24.3 (3)   33.8 (1)   34.2 (1)
    100 x (16 + 1..12)             10.7 (12)  10.3 (4)   11.9 (2)   18.4 (1)   20.1 (1)
    300 x (8 + 1..16)              28.6 (16)  30.3 (8)   41.2 (4)   66.5 (2)   66.8 (1)

A value a little above the best of one quiet thread is taken: where threads wait for
each other, calls cost more.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from casa.attention.pick import Pick
from casa.windows import WindowLayout

CALL = 100_000.0
ENTRY = 0.13


@dataclass(frozen=True)
class Shape:
    """What one window asks of attention, free of where it lies: windows of one Shape have one mask."""

    queries: int  # those that see something: a suffix of the window's text
    idle: int  # queries before them, which see nothing
    length: int  # text tokens
    text_keys: int
    earlier: int  # image tokens of earlier windows, all of them seen
    own: tuple[tuple[int, int], ...]  # (position, tokens) of the window's own images that some text sees

    @property
    def own_keys(self) -> int:
        return sum(tokens for _, tokens in self.own)

    @property
    def keys(self) -> int:
        return self.earlier + self.own_keys + self.text_keys

    def mask(self) -> Tensor:
        """bool (queries, keys); keys in the order earlier images, own images, text."""
        stands = [-1] * self.earlier
        for position, tokens in self.own:
            stands += [position] * tokens
        stands += range(self.text_keys)
        query = torch.arange(self.length - self.queries, self.length)
        return torch.tensor(stands, dtype=torch.int64) <= query[:, None]


@dataclass(frozen=True)
class Call:
    """One batched attention over `windows`, all padded to `queries` and `keys`."""

    windows: tuple[int, ...]
    shapes: tuple[Shape, ...]  # of each of the windows
    queries: int
    keys: int

    @property
    def entries(self) -> int:
        return len(self.windows) * self.queries * self.keys

    def bias(self, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What is added to the scores, (1 or windows, 1, groups * queries, keys); None if all see all.

        One head's mask is repeated for the query heads that are folded into its rows. Padded queries see the
        first key, so that no row is empty.
        """
        shapes = self.shapes[:1] if len(set(self.shapes)) == 1 else self.shapes
        full = torch.zeros(len(shapes), self.queries, self.keys, dtype=torch.bool)
        for row, shape in zip(full, shapes, strict=True):
            row[: shape.queries, : shape.keys] = shape.mask()
            row[shape.queries :, 0] = True
        if full.all():
            return None
        bias = torch.zeros(full.shape, dtype=dtype).masked_fill(~full, -torch.inf)
        return bias.repeat(1, groups, 1)[:, None].to(device)


@dataclass(frozen=True)
class Plan:
    """The calls, and how their padded rows are picked from the packed tensors and put back.

    Keys and values are picked from image rows, then text rows (if attended), then the rows of `turned`: the
    images of earlier windows, (window, delta) as in `casa_attention`.
    """

    calls: tuple[Call, ...]
    query: Pick
    key: Pick
    value: Pick
    out: Pick
    turned: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "Plan":
        picks = {name: getattr(self, name).to(device) for name in ("query", "key", "value", "out")}
        return replace(self, **picks)


def make_plan(layout: WindowLayout, attend: str, width: int, turning: bool) -> Plan | None:
    """The plan for a layout, None if no text sees anything. width is Hq * D; turning: `turn` is wanted."""
    calls = _calls([_shape(layout, number, attend) for number in range(layout.num_windows)], width)
    if not calls:
        return None
    windows = layout.windows
    query_start = list(accumulate((w.num_query for w in windows), initial=0))
    queries, keys, values = _Rows(), _Rows(), _Rows()
    turned: list[tuple[int, int]] = []
    packed = layout.num_image + (layout.num_text if attend == "both" else 0)
    rows = packed  # picked from, for keys: grows by what is turned
    out = torch.zeros(layout.num_query, dtype=torch.int64)
    seeing = torch.zeros(layout.num_query, dtype=torch.bool)
    for call in calls:
        for number, shape in zip(call.windows, call.shapes, strict=True):
            window = windows[number]
            start, stop = query_start[number] + shape.idle, query_start[number + 1]
            out[start:stop] = torch.arange(queries.count, queries.count + shape.queries)
            seeing[start:stop] = True
            queries.add(start, stop)
            queries.pad(call.queries - shape.queries)
            for other in layout.visible_windows(number)[:-1]:
                seen = windows[other]
                values.add(seen.image_start, seen.image_stop)
                if turning and seen.num_image:
                    turned.append((other, seen.text_start - window.text_start))
                    keys.add(rows, rows + seen.num_image)
                    rows += seen.num_image
                else:
                    keys.add(seen.image_start, seen.image_stop)
            for picked in (keys, values):
                picked.add(window.image_start, window.image_start + shape.own_keys)
                if shape.text_keys:
                    picked.add(layout.num_image + window.text_start, layout.num_image + window.text_stop)
                picked.pad(call.keys - shape.keys)
    return Plan(
        calls,
        queries.pick(layout.num_query),
        keys.pick(rows),
        values.pick(packed),
        Pick.of(out, seeing, queries.count, blank=(~seeing).nonzero().squeeze(1)),
        tuple(turned),
    )


class _Rows:
    """Source rows listed in the order in which they are picked."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.valid: list[Tensor] = []
        self.count = 0

    def add(self, start: int, stop: int) -> None:
        if stop > start:
            self.pieces.append(torch.arange(start, stop))
            self.valid.append(torch.ones(stop - start, dtype=torch.bool))
            self.count += stop - start

    def pad(self, number: int) -> None:
        # with a row of the same window, so that nothing strange in another window is multiplied by zero
        if number:
            self.pieces.append(self.pieces[-1][-1:].expand(number))
            self.valid.append(torch.zeros(number, dtype=torch.bool))
            self.count += number

    def pick(self, sources: int) -> Pick:
        return Pick.of(torch.cat(self.pieces), torch.cat(self.valid), sources)


def _calls(shapes: list[Shape], width: int) -> tuple[Call, ...]:
    """Windows of equal shape together; along growing size, joined to the last call if that costs less."""
    alike: dict[Shape, list[int]] = {}
    for number, shape in enumerate(shapes):
        if shape.queries:
            alike.setdefault(shape, []).append(number)
    calls: list[Call] = []
    for shape, numbers in sorted(alike.items(), key=lambda item: (item[0].keys, item[0].queries)):
        alone = Call(tuple(numbers), (shape,) * len(numbers), shape.queries, shape.keys)
        if calls:
            last = calls[-1]
            joined = Call(
                last.windows + alone.windows,
                last.shapes + alone.shapes,
                max(last.queries, alone.queries),
                max(last.keys, alone.keys),
            )
            if (joined.entries - last.entries - alone.entries) * width * ENTRY < CALL:
                calls[-1] = joined
                continue
        calls.append(alone)
    return tuple(calls)


def _shape(layout: WindowLayout, number: int, attend: str) -> Shape:
    window = layout.windows[number]
    earlier = sum(layout.windows[w].num_image for w in layout.visible_windows(number)[:-1])
    stands = [(i.text_position - window.text_start, i.stop - i.start) for i in window.images]
    own = tuple((position, tokens) for position, tokens in stands if position < window.num_text)
    queries = window.num_query
    if attend == "image" and not earlier:
        queries = min(queries, window.num_text - own[0][0]) if own else 0
    return Shape(
        queries=queries,
        idle=window.num_query - queries,
        length=window.num_text,
        text_keys=window.num_text if attend == "both" else 0,
        earlier=earlier,
        own=own,
    )
