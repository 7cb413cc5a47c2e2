"""What CASA layers are kept from, to see what they need: keys that no query sees, updates that are dropped.

Shapes: Q queries, T text tokens, N image tokens, Hq query heads, Hkv key heads, D channels of a head.

A model has at most one `Ablation` at a time, as its attribute `ablation` (see `casa.analysis.ablated`). Whoever takes a
shorter way than through the layers asks whether it is None.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.windows import WindowLayout


@dataclass(frozen=True)
class Ablation:
    """What is taken from all queries of every CASA layer.

    Attributes:
        hidden: Any of "itself" (the token's own key, the paper's implicit gate), "text" (all text keys), "random_text"
            (one other text token, drawn for each query and layer) and "images". A query that sees nothing gets zeros.
        silent: Numbers of the fusion layers whose update is dropped; they still keep keys and values.
        seed: Of the draws. They depend on a query's place in its window alone, so that a text in pieces, or in a batch,
            loses what it loses in one pass.
    """

    hidden: frozenset[str] = frozenset()
    silent: frozenset[int] = frozenset()
    seed: int = 0

    def mask(
        self, layout: WindowLayout, layer: int, attend: str = "both", device: torch.device | str = "cpu"
    ) -> Tensor:
        """bool (Q, N + T), image columns first: what each query still sees in layer number `layer`."""
        seen = layout.mask(device)
        image, text = seen[:, : layout.num_image], seen[:, layout.num_image :]
        query = layout.on(device, "query_index")
        row = torch.arange(len(query), device=device)
        if attend == "image" or "text" in self.hidden:
            text[:] = False
        if "images" in self.hidden:
            image[:] = False
        if "itself" in self.hidden:
            text[row, query] = False
        if "random_text" in self.hidden:
            place = layout.on(device, "text_position")[query]
            has_other = place > 0
            other = query - place + _drawn(place, layer, self.seed)
            text[row[has_other], other[has_other]] = False
        return seen

    def attention(
        self,
        layer: int,
        query: Tensor,
        text_key: Tensor,
        text_value: Tensor,
        image_key: Tensor,
        image_value: Tensor,
        layout: WindowLayout,
        scale: float | None = None,
        attend: str = "both",
        turn: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """(Q, Hq, D): as `casa_attention`, of layer number `layer`, over what is left to see; window by window."""
        seen = self.mask(layout, layer, attend, query.device)
        found, row = [], 0
        for number, window in enumerate(layout.windows):
            rows = slice(row, row + window.num_query)
            row = rows.stop
            visible = [layout.windows[other] for other in layout.visible_windows(number)]
            text = slice(window.text_start, window.text_stop)
            images = slice(visible[0].image_start, window.image_stop)
            key = [
                part if turn is None or other is window else turn(part, other.text_start - window.text_start)
                for other in visible
                for part in [image_key[other.image_start : other.image_stop]]
            ]
            mask = torch.cat([seen[rows, : layout.num_image][:, images], seen[rows, layout.num_image :][:, text]], 1)
            # a softmax over nothing is no number: such a query looks at all, and what it finds is thrown away
            some = mask.any(1)
            out = F.scaled_dot_product_attention(
                query[rows].transpose(0, 1),
                torch.cat([*key, text_key[text]]).transpose(0, 1),
                torch.cat([image_value[images], text_value[text]]).transpose(0, 1),
                attn_mask=mask | ~some[:, None],
                scale=scale,
                enable_gqa=True,
            )
            found.append(torch.where(some[:, None, None], out.transpose(0, 1), out.new_zeros(())))
        return torch.cat(found) if found else torch.zeros_like(query)


def _drawn(place: Tensor, layer: int, seed: int) -> Tensor:
    """A number in 0..place - 1 for each place, int64; 0 for place 0. A hash, so that it hangs on nothing else."""
    word = 0xFFFFFFFF
    mixed = (place * 0x9E3779B1 + (layer + 1) * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D) & word
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & word
    return (mixed ^ (mixed >> 16)) % place.clamp(min=1)
