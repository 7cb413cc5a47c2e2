"""One frame for each of several sessions in one pass: what a session says is the same alone and in company.

Shapes: n sessions, L tokens of the call per row, S tokens cached so far, V vocabulary.

Every session brings the tokens around its frame; rows are padded on the left, their frames encoded together. Then all
rows decode in step. A row that has finished runs on, unheard, until the last one has, and is cut back afterwards: that
costs less than taking rows out of the batch.
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
    and then no pixels. pick: the next token, from logits (V,) and what has been said so far. stops: tokens that end a
    caption; stop: the one that stands for a caption that time or `most` cut short. most: tokens of the longest caption.
    draws: the generator that `pick` draws from.
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


@dataclass(frozen=True)
class Said:
    """tokens: the caption. pending: the token that ended it, chosen and not yet fed. whole: False if time cut it."""

    tokens: list[int]
    pending: int
    cache: CasaCache
    whole: bool


@torch.no_grad()
def run_together(
    model: CasaForConditionalGeneration, calls: Sequence[Call], cut: Callable[[], bool] | None = None
) -> list[Said]:
    """Runs one call per session. The cache of a single call is gone on with; those of several are copied.

    cut: asked before every token; once it says True, all captions end where they are.
    """
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
        stopped = cut is not None and cut()
        for caption, row in zip(captions, logits, strict=True):
            caption.take(row, stopped)
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
        found.append(Said(caption.tokens, caption.pending, own, caption.whole))
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

    def take(self, logits: Tensor, stopped: bool) -> None:
        """Chooses the next token, unless the caption has ended."""
        if not self.is_open:
            return
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
        seeing = [call for call in calls if call.place is not None]
        inputs["image_positions"] = torch.tensor(places)
        inputs |= {name: torch.cat([call.pixels[name] for call in seeing]) for name in seeing[0].pixels}
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
