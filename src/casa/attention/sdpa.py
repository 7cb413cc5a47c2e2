"""CASA attention through `F.scaled_dot_product_attention`, a few batched calls, forward and backward.

Shapes: B windows in a call, q queries and s keys of each (padded), G = Hq / Hkv; the rest as in dispatch.py.

The G query heads of a key head are folded into the rows of one attention, (B, Hkv, G * q, D): no key is
copied per query head and no kernel needs to know of groups. Blocks are cut from the packed tensors by one
`split` each, whose backward is one concatenation; a slice per window would write a full-size gradient each.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention.pick import zeros_of
from casa.attention.plan import Plan, make_plan
from casa.windows import WindowLayout


def attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    layout: WindowLayout,
    *,
    scale: float,
    attend: str,
    turn: Callable[[Tensor, int], Tensor] | None,
) -> Tensor:
    """See `casa_attention`."""
    _, Hq, D = query.shape
    groups = Hq // text_key.shape[1]
    turning = turn is not None and layout.history != 0
    what = (attend, Hq * D, turning, query.device)
    plan = layout.cached(("sdpa", *what), lambda: _plan(layout, *what))
    if plan is None:
        return zeros_of(query)
    biases = layout.cached(
        ("sdpa bias", *what, groups, query.dtype),
        lambda: [call.bias(groups, query.dtype, query.device) for call in plan.calls],
    )
    keys = [image_key, text_key] if attend == "both" else [image_key]
    if turn is not None:
        windows = layout.windows
        images = image_key.split([window.num_image for window in windows])
        keys += [turn(images[other], delta) for other, delta in plan.turned]
    key = plan.key(torch.cat(keys))
    value = plan.value(torch.cat([image_value, text_value]) if attend == "both" else image_value)

    rows = [len(call.windows) * call.queries for call in plan.calls]
    columns = [len(call.windows) * call.keys for call in plan.calls]
    blocks = zip(plan.query(query).split(rows), key.split(columns), value.split(columns), strict=True)
    results = []
    for call, bias, (q, k, v) in zip(plan.calls, biases, blocks, strict=True):
        batch = len(call.windows)
        # (B * q, Hq, D) -> (B, Hkv, G * q, D), and (B * s, Hkv, D) -> (B, Hkv, s, D)
        q = q.view(batch, call.queries, -1, groups, D).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = (x.unflatten(0, (batch, call.keys)).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        results.append(out.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).reshape(-1, Hq, D))
    return plan.out(torch.cat(results))


def _plan(layout: WindowLayout, attend: str, width: int, turning: bool, device: torch.device) -> Plan | None:
    plan = make_plan(layout, attend, width, turning)
    return None if plan is None else plan.to(device)
