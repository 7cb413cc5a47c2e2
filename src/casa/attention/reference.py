"""What CASA attention means, window by window, in the plainest torch that says it: any dtype, any layout.

Shapes: q queries and s keys of one window, G = Hq / Hkv query heads per key head; the rest as in dispatch.py.
"""

import torch
from torch import Tensor

from casa.attention.common import AttentionInputs, zeros_of


def attention(inputs: AttentionInputs) -> Tensor:
    """See `casa_attention`."""
    query, layout, turn = inputs.query, inputs.layout, inputs.turn
    out = zeros_of(query)
    image_before = layout.on(query.device, "image_text_index")
    row = 0
    for number, window in enumerate(layout.windows):
        rows = slice(row, row + window.num_query)
        row = rows.stop
        token = torch.arange(window.query_start, window.text_stop, device=query.device)[:, None]  # (q, 1)

        keys, values, seen = [], [], []
        for other in layout.visible_windows(number):
            images = slice(layout.windows[other].image_start, layout.windows[other].image_stop)
            key = inputs.image_key[images]
            if turn is not None and other != number:
                key = turn(key, layout.windows[other].text_start - window.text_start)
            keys.append(key)
            values.append(inputs.image_value[images])
            seen.append(image_before[images] <= token)
        if inputs.attend == "both":
            text = slice(window.text_start, window.text_stop)
            keys.append(inputs.text_key[text])
            values.append(inputs.text_value[text])
            seen.append(torch.arange(text.start, text.stop, device=query.device) <= token)

        mask = torch.cat(seen, dim=1)  # (q, s)
        some = mask.any(dim=1)  # queries that see nothing keep their zeros
        if some.any():
            picked = torch.arange(rows.start, rows.stop, device=query.device)[some]
            result = _attend(query[picked], torch.cat(keys), torch.cat(values), mask[some], inputs.scale)
            out = out.index_copy(0, picked, result)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v under a mask: (q, Hq, D), two of (s, Hkv, D), bool (q, s) -> (q, Hq, D)."""
    group = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, group))  # (q, Hkv, G, D)
    scores = torch.einsum("qhgd,shd->hgqs", grouped, key) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hgqs,shd->qhgd", weights, value).flatten(1, 2)
