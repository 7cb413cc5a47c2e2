"""CASA attention through `F.scaled_dot_product_attention`: a few batched calls, forward and backward.

Shapes: B windows in a batch, q queries and s keys of each (padded), G = Hq / Hkv; the rest as in dispatch.py.

The G query heads of a key head are folded into the rows of one attention, (B, Hkv, G * q, D): no key is
copied per query head and no kernel needs to know of groups. Blocks are cut from the packed tensors by one
`split` each, whose backward is one concatenation; a slice per window would write a full-size gradient each.

Which windows share a batch is decided once per layout, by cost. One call takes about `CALL` ns plus `ENTRY` ns for
each multiply-add of its padded scores (windows x queries x keys x Hq x D), forward and backward together. Windows of
equal shape share a call for free; padding a window up to a neighbour's shape pays when the added work costs less than
the call it saves. Milliseconds forward + backward for several values of CALL, in ns (8 and 2 heads, D 64, fp32, one
thread of a 2-core machine; number of calls in brackets), from which the value below was chosen:

    windows x (image + text)       0          50,000     150,000    600,000    no limit
    16 x (256 + 4..90)             40.9 (16)  36.3 (13)  39.0 (8)   41.4 (4)   66.0 (1)
    64 x (64 + 4..28)              23.5 (22)  23.5 (8)   24.3 (3)   33.8 (1)   34.2 (1)
    100 x (16 + 1..12)             10.7 (12)  10.3 (4)   11.9 (2)   18.4 (1)   20.1 (1)
    300 x (8 + 1..16)              28.6 (16)  30.3 (8)   41.2 (4)   66.5 (2)   66.8 (1)

A value a little above the best of one quiet thread is taken: where threads wait for each other, calls cost more.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention.common import AttentionInputs, RowGather, RowList, bias_of, joined, zeros_of
from casa.windows import WindowLayout

CALL = 100_000.0
ENTRY = 0.13


def attention(inputs: AttentionInputs) -> Tensor:
    """See `casa_attention`."""
    query, layout, attend = inputs.query, inputs.layout, inputs.attend
    _, Hq, D = query.shape
    groups = Hq // inputs.text_key.shape[1]
    what = (attend, Hq * D, inputs.turning)
    made = layout.cached(("sdpa", *what, query.device), lambda: make_batches(layout, *what, query.device))
    if made is None:
        return zeros_of(query)
    biases = layout.cached(
        ("sdpa bias", *what, groups, query.dtype, query.device),
        lambda: [batch.bias(groups, query.dtype, query.device) for batch in made.batches],
    )
    key = made.key(joined([*inputs.keys, *inputs.turned_keys(made.turned)]))
    value = made.value(joined(inputs.values))

    rows = [len(batch.windows) * batch.queries for batch in made.batches]
    columns = [len(batch.windows) * batch.keys for batch in made.batches]
    blocks = zip(made.query(query).split(rows), key.split(columns), value.split(columns), strict=True)
    results = []
    for batch, bias, (q, k, v) in zip(made.batches, biases, blocks, strict=True):
        count = len(batch.windows)
        # (B * q, Hq, D) -> (B, Hkv, G * q, D), and (B * s, Hkv, D) -> (B, Hkv, s, D)
        q = q.view(count, batch.queries, -1, groups, D).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = (x.unflatten(0, (count, batch.keys)).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=inputs.scale)
        results.append(out.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).reshape(-1, Hq, D))
    return made.out(torch.cat(results))


@dataclass(frozen=True)
class WindowShape:
    """What one window asks of attention, free of where it lies: windows of one shape have one mask."""

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
class WindowBatch:
    """One batched attention over `windows`, all padded to `queries` and `keys`."""

    windows: tuple[int, ...]
    shapes: tuple[WindowShape, ...]  # of each of the windows
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
        return bias_of(full, dtype).repeat(1, groups, 1)[:, None].to(device)


@dataclass(frozen=True)
class WindowBatches:
    """The batches, and how their padded rows are gathered from the packed tensors and put back.

    Keys and values are gathered from image rows, then text rows (if attended), then the rows of `turned`: the
    images of earlier windows, (window, delta) as in `casa_attention`.
    """

    batches: tuple[WindowBatch, ...]
    query: RowGather
    key: RowGather
    value: RowGather
    out: RowGather
    turned: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "WindowBatches":
        return replace(self, **{name: getattr(self, name).to(device) for name in ("query", "key", "value", "out")})


def make_batches(
    layout: WindowLayout, attend: str, width: int, turning: bool, device: torch.device | None = None
) -> WindowBatches | None:
    """The batches of a layout, None if no text sees anything. width is Hq * D; turning: `turn` is wanted."""
    batches = _grouped([_shape(layout, number, attend) for number in range(layout.num_windows)], width)
    if not batches:
        return None
    windows = layout.windows
    query_start = list(accumulate((w.num_query for w in windows), initial=0))
    queries, keys, values = RowList(), RowList(), RowList()
    turned: list[tuple[int, int]] = []
    packed = layout.num_image + (layout.num_text if attend == "both" else 0)
    rows = packed  # gathered from, for keys: grows by what is turned
    out = torch.zeros(layout.num_query, dtype=torch.int64)
    seeing = torch.zeros(layout.num_query, dtype=torch.bool)
    for batch in batches:
        for number, shape in zip(batch.windows, batch.shapes, strict=True):
            window = windows[number]
            start, stop = query_start[number] + shape.idle, query_start[number + 1]
            out[start:stop] = torch.arange(queries.count, queries.count + shape.queries)
            seeing[start:stop] = True
            queries.add((start, stop))
            queries.pad(batch.queries - shape.queries)
            for other in layout.visible_windows(number)[:-1]:
                images = windows[other].image_start, windows[other].image_stop
                values.add(images)
                if turning and windows[other].num_image:
                    turned.append((other, windows[other].text_start - window.text_start))
                    images = rows, rows + windows[other].num_image
                    rows = images[1]
                keys.add(images)
            own = [(window.image_start, window.image_start + shape.own_keys)]
            if shape.text_keys:
                own.append((layout.num_image + window.text_start, layout.num_image + window.text_stop))
            for listed in (keys, values):
                listed.add(*own)
                listed.pad(batch.keys - shape.keys)
    made = WindowBatches(
        batches,
        query=queries.gather(layout.num_query),
        key=keys.gather(rows),
        value=values.gather(packed),
        out=RowGather.of(out, seeing, queries.count, blank=(~seeing).nonzero().squeeze(1)),
        turned=tuple(turned),
    )
    return made if device is None else made.to(device)


def _grouped(shapes: list[WindowShape], width: int) -> tuple[WindowBatch, ...]:
    """Windows of equal shape together; along growing size, joined to the last batch if that costs less."""
    alike: dict[WindowShape, list[int]] = {}
    for number, shape in enumerate(shapes):
        if shape.queries:
            alike.setdefault(shape, []).append(number)
    batches: list[WindowBatch] = []
    for shape, numbers in sorted(alike.items(), key=lambda item: (item[0].keys, item[0].queries)):
        alone = WindowBatch(tuple(numbers), (shape,) * len(numbers), shape.queries, shape.keys)
        if batches:
            last = batches[-1]
            both = WindowBatch(
                last.windows + alone.windows,
                last.shapes + alone.shapes,
                max(last.queries, alone.queries),
                max(last.keys, alone.keys),
            )
            if (both.entries - last.entries - alone.entries) * width * ENTRY < CALL:
                batches[-1] = both
                continue
        batches.append(alone)
    return tuple(batches)


def _shape(layout: WindowLayout, number: int, attend: str) -> WindowShape:
    window = layout.windows[number]
    earlier = sum(layout.windows[w].num_image for w in layout.visible_windows(number)[:-1])
    stands = [(i.text_position - window.text_start, i.stop - i.start) for i in window.images]
    own = tuple((position, tokens) for position, tokens in stands if position < window.num_text)
    queries = window.num_query
    if attend == "image" and not earlier:
        queries = min(queries, window.num_text - own[0][0]) if own else 0
    return WindowShape(
        queries=queries,
        idle=window.num_query - queries,
        length=window.num_text,
        text_keys=window.num_text if attend == "both" else 0,
        earlier=earlier,
        own=own,
    )
