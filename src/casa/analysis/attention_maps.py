"""Where text looks, per layer and head: at itself, at other text, at image tokens, at sinks (paper, "Implicit gate").

Shapes: C layers, q chosen text tokens, Hq query heads, Hkv key heads, D channels of a head, N image and T text tokens.

The softmax is taken again, in float64, over the queries and keys that a forward pass hands out: those of the CASA
layers under the layout's mask, or those of the blocks' own self-attention under the mask they were given. Under
insertion, image tokens stand in the text, and their columns are told apart by where the stream put them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from casa.analysis.self_attention import watch_self_attention
from casa.errors import UserError
from casa.layers import Turner
from casa.models import CasaForConditionalGeneration
from casa.models.cache import pop_cache
from casa.models.inputs import read_image_places
from casa.models.insertion import merge
from casa.vision import token_grids
from casa.windows import ImageSpan, WindowLayout

KINDS = ("itself", "text", "image", "sinks")
SINK_SHARE = 0.3  # Gu et al., "When Attention Sink Emerges" (2024): a key that draws so much of the others' attention
SINK_QUERIES = 4  # ... of so many at least: what few look at is no sink
CHUNK = 64  # queries whose whole rows of attention are held at once


@dataclass(frozen=True)
class AttentionShares:
    """Attention of chosen text tokens in every layer. A row of weights sums to one, or to zero where nothing is seen.

    Attributes:
        blocks: The block that each layer belongs to.
        tokens: The chosen tokens, by index in the text.
        weights: float64 (C, Hq, q, N + T), image columns first.
        sinks: bool (C, Hq, N + T), keys that draw more than `SINK_SHARE` of the attention of all text that sees them,
            their own left out, whatever it says.
        num_other: int64 (q,), how many other text tokens the token sees.
        num_image: int64 (q,), how many image tokens.
        images: The images' places in N.
        grids: Their (rows, columns).
    """

    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    weights: Tensor
    sinks: Tensor
    num_other: Tensor
    num_image: Tensor
    images: tuple[ImageSpan, ...]
    grids: tuple[tuple[int, int], ...]

    @property
    def num_columns(self) -> int:
        """N, image tokens."""
        return self.images[-1].stop if self.images else 0

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Attention to itself, to other text and to images, float64 (C, Hq, q) each, sinks included."""
        image, text = self.weights[..., : self.num_columns], self.weights[..., self.num_columns :]
        own = self._own
        return own, text.sum(-1) - own, image.sum(-1)

    @property
    def shares(self) -> Tensor:
        """float64 (4, C, Hq, q), in the order of `KINDS`: what goes to sinks is counted there alone.

        A token's look at itself stays its own, though others take it for a sink.
        """
        drawn = self.weights * self.sinks[:, :, None]
        image, text = drawn[..., : self.num_columns].sum(-1), drawn[..., self.num_columns :]
        text = text.sum(-1) - text.gather(-1, self._index)[..., 0]
        own, other, seen = self.heads
        return torch.stack([own, other - text, seen - image, text + image])

    @property
    def _index(self) -> Tensor:
        """int64 (C, Hq, q, 1): each token's own column among the text."""
        return torch.tensor(self.tokens, dtype=torch.int64).view(-1, 1).expand(*self.weights.shape[:3], 1)

    @property
    def _own(self) -> Tensor:
        return self.weights[..., self.num_columns :].gather(-1, self._index)[..., 0]

    @cached_property
    def own(self) -> Tensor:
        """float64 (C, q), mean over heads: attention to itself."""
        return self.heads[0].mean(1)

    @cached_property
    def other_text(self) -> Tensor:
        """float64 (C, q), mean over heads: attention to all other visible text."""
        return self.heads[1].mean(1)

    @cached_property
    def image(self) -> Tensor:
        """float64 (C, q), mean over heads: attention to all visible images."""
        return self.heads[2].mean(1)

    @cached_property
    def image_weights(self) -> Tensor:
        """float64 (C, q, N), mean over heads."""
        return self.weights[..., : self.num_columns].mean(1)

    @property
    def per_other_text(self) -> Tensor:
        """Attention to one other text token, float64 (C, q): NaN where none is seen."""
        return self.other_text / self.num_other

    @property
    def per_image_token(self) -> Tensor:
        """Attention to one image token, float64 (C, q): NaN where none is seen."""
        return self.image / self.num_image

    def image_entropy(self) -> Tensor:
        """float64 (C, Hq, q), nats: how widely the attention to images is spread; NaN where none is seen.

        Of the attention to image tokens, made to sum to one: 0 at a single token, log N over all alike.
        """
        image = self.weights[..., : self.num_columns]
        image = image / image.sum(-1, keepdim=True)
        return -torch.special.xlogy(image, image).sum(-1)

    def image_map(self, layer: int, token: int, image: int = -1, head: int | None = None) -> Tensor:
        """Attention of text token `token` to each token of one image in layer number `layer`: float64 (rows, columns).

        Args:
            layer: Its number, in the order of `blocks`.
            token: One of `tokens`.
            image: Its number in the call, by default the last.
            head: One query head; the mean over all if None.

        Raises:
            UserError: The token was not chosen, or there is no image.
        """
        if token not in self.tokens:
            raise UserError(f"token {token} was not measured; choose one of {list(self.tokens)}.")
        if not self.images:
            raise UserError("there is no image to look at; give inputs with one.")
        span, grid, place = self.images[image], self.grids[image], self.tokens.index(token)
        found = self.image_weights[layer, place] if head is None else self.weights[layer, head, place]
        return found[span.start : span.stop].reshape(grid)

    def sharpest_layer(self, token: int, image: int = -1) -> int:
        """The layer in which the token looks hardest at a single place of the image."""
        return max(range(len(self.blocks)), key=lambda layer: float(self.image_map(layer, token, image).max()))


@torch.no_grad()
def attention_shares(
    model: CasaForConditionalGeneration,
    inputs: Mapping[str, Any],
    tokens: Sequence[int] | None = None,
    *,
    self_attention: bool = False,
) -> AttentionShares:
    """Runs the model once over one text with images and measures where the tokens look.

    Args:
        model: Any model of this library. An ablation that is at work on it is measured too.
        inputs: As from the processor, one row without padding.
        tokens: Indices in its text; by default all that see an image. A token that a model writes is decided one place
            earlier: look there for what it was read from.
        self_attention: Looks into the blocks' own self-attention, where a CASA model sees no image, instead of the
            fusion layers. An insertion model has no other.

    Returns:
        The shares, on the CPU.

    Raises:
        UserError: Several rows, a token out of range, or no layer that runs.
    """
    ids = inputs["input_ids"]
    check_one_text(inputs)
    for token in tokens or []:
        if not 0 <= token < ids.shape[1]:
            raise UserError(f"token {token} is out of range 0..{ids.shape[1] - 1} of the text.")
    grid = inputs.get("image_grid_thw")
    grids = tuple(model.final_grids(token_grids(model.config.encoder_config, grid))) if grid is not None else ()
    if model.fusion.method == "insertion" or self_attention:
        found = _self_attention(model, inputs, grids, tokens)
    else:
        found = _fusion(model, inputs, tokens)
    if not found.weights:
        raise UserError("no CASA layer ran: the text has no image; give one.")
    mask = found.seen[list(found.tokens)]
    num_image = mask[:, : found.num_image].sum(1)
    return AttentionShares(
        blocks=tuple(found.blocks),
        tokens=tuple(found.tokens),
        weights=torch.stack(found.weights),
        sinks=torch.stack(found.sinks),
        # plain cross-attention sees no text at all, itself included
        num_other=(mask[:, found.num_image :].sum(1) - 1).clamp(min=0),
        num_image=num_image,
        images=tuple(found.images),
        grids=grids if found.num_image else (),
    )


def check_one_text(inputs: Mapping[str, Any]) -> None:
    """Raises UserError unless inputs are one row without padding and without a cache."""
    if inputs["input_ids"].shape[0] != 1 or not bool(inputs.get("attention_mask", torch.ones(1)).all()):
        raise UserError("give one text without padding; measure several one by one.")
    if pop_cache(dict(inputs)) is not None:
        raise UserError("give the whole text in one call, without past_key_values.")


class _Found:
    """What is gathered layer by layer. seen: bool (T, N + T), what any layer sees."""

    def __init__(self, tokens: Sequence[int] | None) -> None:
        self.chosen = None if tokens is None else list(tokens)
        self.blocks: list[int] = []
        self.weights: list[Tensor] = []
        self.sinks: list[Tensor] = []
        self.seen = torch.zeros(0, 0, dtype=torch.bool)
        self.images: Sequence[ImageSpan] = ()
        self.num_image = 0

    @property
    def tokens(self) -> list[int]:
        return self.chosen or []

    def add(self, block: int, scores: Callable[[Tensor], Tensor], mask: Tensor) -> None:
        """scores: of queries (n,) int64, (Hq, n, N + T). mask: bool (T, N + T)."""
        if not self.weights:
            self.seen = mask
        number = {token: place for place, token in enumerate(self.tokens)}
        kept: list[Tensor] = [torch.empty(0)] * len(number)
        drawn = count = torch.zeros(())
        for queries in torch.arange(len(mask)).split(CHUNK):
            seen = mask[queries]
            # a query that sees nothing has no softmax
            rows = scores(queries).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            for row, token in enumerate(queries.tolist()):
                if token in number:
                    kept[number[token]] = rows[:, row]
            others = seen.clone()
            others[torch.arange(len(queries)), self.num_image + queries] = False
            drawn = drawn + (rows * others).sum(1)
            count = count + others.sum(0)
        self.blocks.append(block)
        self.weights.append(torch.stack(kept, 1) if kept else drawn.new_zeros(len(drawn), 0, mask.shape[1]))
        self.sinks.append((drawn > SINK_SHARE * count) & (count >= SINK_QUERIES))


def _fusion(model: CasaForConditionalGeneration, inputs: Mapping[str, Any], tokens: Sequence[int] | None) -> _Found:
    """The CASA layers: their queries and keys come out of the forward pass."""
    found, fusion = _Found(tokens), model.fusion
    rotaries = model.decoder.rotaries(model.fused_blocks, torch.device("cpu"), torch.float64)
    # plain cross-attention has no rotary positions to turn
    turns = [Turner(r) if fusion.history and fusion.attend == "both" else None for r in rotaries]

    def record(layer: int, query: Tensor, text_key: Tensor, image_key: Tensor, layout: WindowLayout) -> None:
        query, text_key, image_key = (x.detach().cpu().double() for x in (query, text_key, image_key))
        found.images, found.num_image = layout.images, layout.num_image
        if found.chosen is None:
            found.chosen = layout.sees_image.nonzero().flatten().tolist()
        if model.ablation is not None:
            mask = model.ablation.mask(layout, layer, fusion.attend)
        else:
            mask = layout.mask()
            mask[:, layout.num_image :] &= fusion.attend == "both"

        def scores(queries: Tensor) -> Tensor:
            image = _image_scores(_grouped(query[queries], image_key), image_key, layout, queries, turns[layer])
            # stand-ins for text keys have no meaning of their own: nobody looks at them
            text = torch.einsum("qhgd,thd->hgqt", _grouped(query[queries], text_key), text_key)
            return torch.cat([image, text], -1).flatten(0, 1) * query.shape[-1] ** -0.5

        found.add(model.fused_blocks[layer], scores, mask)

    model(**inputs, use_cache=False, record=record)
    return found


def _self_attention(
    model: CasaForConditionalGeneration,
    inputs: Mapping[str, Any],
    grids: Sequence[tuple[int, int]],
    tokens: Sequence[int] | None,
) -> _Found:
    """The blocks' self-attention, over text alone or, under insertion, over the stream with images in it."""
    found, length = _Found(tokens), inputs["input_ids"].shape[1]
    inserted = model.fusion.method == "insertion"
    sizes = [rows * columns for rows, columns in grids] if inserted else []
    places = read_image_places(inputs.get("image_positions"), len(grids)) if inserted else []
    stream = merge(torch.ones(1, length, dtype=torch.bool), places, sizes)
    text = stream.text_slot[0]
    # the columns of the stream: image tokens in their order, then text
    order = torch.cat([stream.is_image[0].nonzero().flatten(), text])
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    found.num_image = sum(sizes)
    found.images = [
        ImageSpan(start, start + size, place) for start, size, (_, place) in zip(starts, sizes, places, strict=True)
    ]
    if tokens is None:
        first = places[0][1] if places else length if inserted else 0
        found.chosen = list(range(first, length))

    def record(block: int, query: Tensor, key: Tensor, mask: Tensor, scale: float) -> None:
        query, key = query[0].transpose(0, 1).double(), key[0].transpose(0, 1).double()[order]

        def scores(queries: Tensor) -> Tensor:
            rows = _grouped(query[text[queries]], key)
            return torch.einsum("qhgd,shd->hgqs", rows, key).flatten(0, 1) * scale

        found.add(block, scores, mask[text][:, order])

    with watch_self_attention(model.decoder, record):
        model(**inputs, use_cache=False)
    return found


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(q, Hq, D) as (q, Hkv, G, D): the query heads of each key head."""
    return query.unflatten(1, (key.shape[1], -1))


def _image_scores(query: Tensor, image_key: Tensor, layout: WindowLayout, chosen: Tensor, turn: Any) -> Tensor:
    """(Hkv, G, q, N). Keys of earlier windows are turned to their distance from the query's window."""
    if turn is None:
        return torch.einsum("qhgd,nhd->hgqn", query, image_key)
    windows = layout.text_window[chosen]
    rows = []
    for number in windows.unique().tolist():  # in order, as the queries are
        own = layout.windows[number]
        keys = [turn(image_key[w.image_start : w.image_stop], w.text_start - own.text_start) for w in layout.windows]
        rows.append(torch.einsum("qhgd,nhd->hgqn", query[windows == number], torch.cat(keys)))
    return torch.cat(rows, 2)
