"""Where text looks in each CASA layer: at itself, at other text, at image tokens (paper, "Implicit gate").

Shapes: C CASA layers, q chosen text tokens, Hq query heads, Hkv key heads, N image and T text tokens of the call.

The softmax is taken again, in float64, over the queries and keys that a forward pass hands out, under the layout's
mask; weights are the mean over heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casa.errors import UserError
from casa.layers import turner
from casa.models import CasaForConditionalGeneration
from casa.vision import token_grids
from casa.windows import ImageSpan, WindowLayout


@dataclass(frozen=True)
class AttentionShares:
    """Attention of chosen text tokens in every CASA layer. A row of own + other_text + image sums to one.

    Attributes:
        blocks: The block that each layer belongs to.
        tokens: The chosen tokens, by index in the text.
        own, other_text, image: float64 (C, q), attention to itself, to all other visible text, to all visible images.
        num_other, num_image: int64 (q,), how many other text tokens and image tokens the token sees.
        image_weights: float64 (C, q, N).
        images, grids: The images' places in N, and their (rows, columns).
    """

    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    own: Tensor
    other_text: Tensor
    image: Tensor
    num_other: Tensor
    num_image: Tensor
    image_weights: Tensor
    images: tuple[ImageSpan, ...]
    grids: tuple[tuple[int, int], ...]

    @property
    def per_other_text(self) -> Tensor:
        """Attention to one other text token, float64 (C, q): NaN where none is seen."""
        return self.other_text / self.num_other

    @property
    def per_image_token(self) -> Tensor:
        """Attention to one image token, float64 (C, q): NaN where none is seen."""
        return self.image / self.num_image

    def image_map(self, layer: int, token: int, image: int = -1) -> Tensor:
        """Attention of text token `token` to each token of one image in CASA layer `layer`: float64 (rows, columns).

        Args:
            image: Its number in the call, by default the last.

        Raises:
            UserError: The token was not chosen, or there is no image.
        """
        if token not in self.tokens:
            raise UserError(f"token {token} was not measured; choose one of {list(self.tokens)}.")
        if not self.images:
            raise UserError("there is no image to look at; give inputs with one.")
        span, grid = self.images[image], self.grids[image]
        return self.image_weights[layer, self.tokens.index(token), span.start : span.stop].reshape(grid)

    def sharpest_layer(self, token: int, image: int = -1) -> int:
        """The layer in which the token looks hardest at a single place of the image."""
        return max(range(len(self.blocks)), key=lambda layer: float(self.image_map(layer, token, image).max()))


@torch.no_grad()
def attention_shares(
    model: CasaForConditionalGeneration, inputs: Mapping[str, Any], tokens: Sequence[int] | None = None
) -> AttentionShares:
    """Runs the model once over one text with images and measures where the tokens look.

    Args:
        inputs: As from the processor, one row without padding.
        tokens: Indices in its text; by default all that see an image. A token that a model writes is decided one place
            earlier: look there for what it was read from.

    Raises:
        UserError: Several rows, a token out of range, or an insertion model, which has no such layers.
    """
    if not model.fused_blocks:
        raise UserError("this model has no CASA layers to look into; use one with method 'casa' or 'cross_attention'.")
    ids = inputs["input_ids"]
    if ids.shape[0] != 1 or not bool(inputs.get("attention_mask", torch.ones(1)).all()):
        raise UserError("give one text without padding; measure several one by one.")
    if inputs.get("past_key_values") is not None:
        raise UserError("give the whole text in one call, without past_key_values.")
    chosen = None if tokens is None else list(tokens)
    for token in chosen or []:
        if not 0 <= token < ids.shape[1]:
            raise UserError(f"token {token} is out of range 0..{ids.shape[1] - 1} of the text.")

    rotaries = model.decoder.rotaries(model.fused_blocks, torch.device("cpu"), torch.float64)
    # plain cross-attention has no rotary positions to turn
    turns = [turner(r) if model.fusion.history and model.fusion.attend == "both" else None for r in rotaries]
    found: list[Tensor] = []
    layouts: list[WindowLayout] = []

    def record(layer: int, query: Tensor, text_key: Tensor, image_key: Tensor, layout: WindowLayout) -> None:
        nonlocal chosen
        if chosen is None:
            chosen = layout.sees_image.nonzero().flatten().tolist()
        layouts.append(layout)
        query, text_key, image_key = (x.detach().cpu().double() for x in (query, text_key, image_key))
        picked = torch.tensor(chosen, dtype=torch.int64)
        found.append(_weights(query, text_key, image_key, layout, picked, model.fusion.attend, turns[layer]))

    model(**inputs, use_cache=False, record=record)
    if not found:
        raise UserError("no CASA layer ran: the text has no image; give one.")
    layout, picked = layouts[0], torch.tensor(chosen, dtype=torch.int64)
    weights = torch.stack(found)  # (C, q, N + T)
    image, text = weights[..., : layout.num_image], weights[..., layout.num_image :]
    own = text.gather(2, picked[None, :, None].expand(len(found), -1, 1))[..., 0]
    seen = layout.mask()[picked]
    reads_text = model.fusion.attend == "both"
    num_text = seen[:, layout.num_image :].sum(1) if reads_text else torch.ones_like(picked)
    grid = inputs.get("image_grid_thw")
    return AttentionShares(
        blocks=tuple(model.fused_blocks),
        tokens=tuple(chosen or ()),
        own=own,
        other_text=text.sum(2) - own,
        image=image.sum(2),
        num_other=num_text - 1,
        num_image=seen[:, : layout.num_image].sum(1),
        image_weights=image,
        images=layout.images,
        grids=tuple(model.final_grids(token_grids(model.config.encoder_config, grid))) if grid is not None else (),
    )


def _weights(
    query: Tensor, text_key: Tensor, image_key: Tensor, layout: WindowLayout, chosen: Tensor, attend: str, turn: Any
) -> Tensor:
    """Attention of the chosen queries, (q, N + T), the mean over heads; image columns first, zeros where unseen."""
    heads = image_key.shape[1]
    query = query[chosen].unflatten(1, (heads, -1))  # (q, Hkv, G, D)
    scale = 1 / math.sqrt(query.shape[-1])
    image_scores = _image_scores(query, image_key, layout, chosen, turn)
    mask = layout.mask()[chosen]
    if attend == "image":
        # stand-ins for text keys have no meaning of their own: nobody looks at them
        text_scores = image_scores.new_zeros(*image_scores.shape[:3], layout.num_text)
        mask = mask & (torch.arange(mask.shape[1]) < layout.num_image)
    else:
        text_scores = torch.einsum("qhgd,thd->qhgt", query, text_key)
    scores = torch.cat([image_scores, text_scores], dim=-1) * scale
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
    # a query that sees nothing has no softmax
    return weights.nan_to_num(0.0).mean(dim=(1, 2))


def _image_scores(query: Tensor, image_key: Tensor, layout: WindowLayout, chosen: Tensor, turn: Any) -> Tensor:
    """(q, Hkv, G, N). Keys of earlier windows are turned to their distance from the query's window."""
    if turn is None:
        return torch.einsum("qhgd,nhd->qhgn", query, image_key)
    rows = []
    for row, token in zip(query, chosen.tolist(), strict=True):
        own = layout.windows[int(layout.text_window[token])]
        keys = [
            turn(image_key[w.image_start : w.image_stop], w.text_start - own.text_start)
            for w in layout.windows
            if w.num_image
        ]
        rows.append(torch.einsum("hgd,nhd->hgn", row, torch.cat(keys) if keys else image_key))
    return torch.stack(rows) if rows else image_key.new_zeros(0, *query.shape[1:3], image_key.shape[0])
