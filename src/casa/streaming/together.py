"""One frame for each of several sessions in one pass: what a session says is the same alone and in company.

Shapes: n sessions, L tokens of the call per row, S tokens cached so far, V vocabulary.

Every session brings the tokens around its frame; rows are padded on the left, their frames encoded together. Then all
rows decode in step. A row that has finished runs on, unheard, until the last one has, and is cut back afterwards: that
costs less than taking rows out of the batch. So does a row whose time is over, while the others go on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casa.models import CasaCache, CasaForConditionalGeneration
from casa.streaming import rows


@dataclass(frozen=True)
class Call:
    """What one session feeds.

    tokens: text around the frame. place: index of the token before which the frame stands; None if there is no frame,
    and then no pixels. pixels: as the processor gave them, or what `looked_at` made of them. pick: the next token, from
    logits (V,) and what has been said so far. stops: tokens that end a caption; stop: the one that stands for a caption
    that time or `most` cut short. most: tokens of the longest caption. draws: the generator that `pick` draws from.
    cut: asked before every token; once it says True, this caption ends where it is.
    """

    cache: CasaCache
    tokens: list[int]
    place: int | None
    pixels: dict[str, Tensor]
    pick: Callable[[Tensor, list[int]], int]
    stops: frozenset[int]
    stop: int
    most: int
    draws: torch.Generator
    cut: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Said:
    """call: what was answered. tokens: the caption. pending: the token that ended it, chosen and not yet fed.

    cache: what the session goes on with. whole: False if time cut the caption.
    """

    call: Call
    tokens: list[int]
    pending: int
    cache: CasaCache
    whole: bool


@torch.no_grad()
def looked_at(model: CasaForConditionalGeneration, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model makes of a frame before it reads any text; stands for the frame's pixels in a call."""
    grid = pixels["image_grid_thw"].to(model.device)
    features = model.encode_images(pixels["pixel_values"].to(model.device), grid)
    if model.fusion.method == "insertion":
        return {"image_features": features, "image_grid_thw": grid}
    return {"image_keys_values": model.image_keys_values(features, grid), "image_grid_thw": grid}


@torch.no_grad()
def run_together(model: CasaForConditionalGeneration, calls: Sequence[Call]) -> list[Said]:
    """Runs one call per session. The cache of a single call is gone on with; those of several are copied.

    Whatever breaks it off, the generators are then as they were.
    """
    drawn = [call.draws.get_state() for call in calls]
    try:
        return _run(model, calls)
    except BaseException:
        for call, state in zip(calls, drawn, strict=True):
            call.draws.set_state(state)
        raise


def _run(model: CasaForConditionalGeneration, calls: Sequence[Call]) -> list[Said]:
    alone = len(calls) == 1
    if alone:
        cache, before = calls[0].cache, torch.ones(1, calls[0].cache.num_text, dtype=torch.bool)
    else:
        cache, before = rows.join([call.cache for call in calls], model.new_cache())
    # real: what the model sees of its cache; kept: what is the session's own
    real = torch.cat([before, _valid(calls)], dim=1)
    logits = model(**_inputs(model, calls, None if alone else real), past_key_values=cache).logits[:, -1]
    kept, steps = real, 0
    captions = [_Caption(call) for call in calls]
    while True:
        for caption, row in zip(captions, logits, strict=True):
            caption.take(row)
        if not any(caption.is_open for caption in captions):
            break
        runs = torch.tensor([[caption.is_open] for caption in captions])
        real, kept = torch.cat([real, torch.ones_like(runs)], dim=1), torch.cat([kept, runs], dim=1)
        steps += 1
        logits = model(
            input_ids=torch.tensor([[caption.last] for caption in captions], device=model.device),
            attention_mask=None if alone else real.long().to(model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    found = []
    for row, caption in enumerate(captions):
        idle = steps - int(kept[row, kept.shape[1] - steps :].sum())
        own = cache if alone else rows.part(cache, row, kept[row], idle, model.new_cache())
        found.append(Said(calls[row], caption.tokens, caption.pending, own, caption.whole))
    return found


class _Caption:
    """A caption while it is said."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.tokens: list[int] = []
        self.pending = -1
        self.whole = True

    @property
    def is_open(self) -> bool:
        return self.pending < 0

    @property
    def last(self) -> int:
        """The token to feed; one that has finished feeds its stop token, which is cut back."""
        return self.tokens[-1] if self.is_open else self._call.stop

    def take(self, logits: Tensor) -> None:
        """Chooses the next token, unless the caption has ended or its time is over."""
        if not self.is_open:
            return
        stopped = self._call.cut is not None and self._call.cut()
        if stopped or len(self.tokens) == self._call.most:
            self.pending, self.whole = self._call.stop, not stopped
            return
        token = self._call.pick(logits, self.tokens)
        if token in self._call.stops:
            self.pending = token
        else:
            self.tokens.append(token)


def _valid(calls: Sequence[Call]) -> Tensor:
    """bool (n, L), True where a row's token is real."""
    longest = max(len(call.tokens) for call in calls)
    return torch.arange(longest) >= torch.tensor([longest - len(call.tokens) for call in calls])[:, None]


def _inputs(model: CasaForConditionalGeneration, calls: Sequence[Call], real: Tensor | None) -> dict[str, Any]:
    """The first call of all rows, as the model takes it."""
    longest = max(len(call.tokens) for call in calls)
    ids = [[call.stop] * (longest - len(call.tokens)) + call.tokens for call in calls]
    places = [
        (row, longest - len(call.tokens) + call.place) for row, call in enumerate(calls) if call.place is not None
    ]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids), "use_cache": True, "logits_to_keep": 1}
    if real is not None:
        inputs["attention_mask"] = real.long()
    if places:
        inputs["image_positions"] = torch.tensor(places)
        inputs |= _pixels(model, [call.pixels for call in calls if call.place is not None])
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _pixels(model: CasaForConditionalGeneration, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The frames of the pass, as the model takes them: if some have been looked at ahead, the others are now."""
    if any("pixel_values" not in pixels for pixels in given):
        given = [looked_at(model, pixels) if "pixel_values" in pixels else pixels for pixels in given]
    return {name: torch.cat([pixels[name] for pixels in given]) for name in given[0]}
