"""One frame for each of several sessions in one pass: what a session says is the same alone and in company.

Shapes: n sessions, L tokens of the call per row, S tokens cached so far, V vocabulary.

Every session brings the tokens around its frame; rows are padded on the left, their frames encoded together. Then all
rows decode in step. What a row has come to is taken out as soon as it has finished, or its time is over. The row itself
runs on, unheard, until the last one has: that costs less than a smaller batch. A pass can be ended in the middle of
captions, which then go on in another one, in whatever company.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from casa.models import CasaCache, CasaForConditionalGeneration
from casa.streaming import rows
from casa.threads import settle

UNFINISHED = "\ufffd"  # how a tokenizer shows a character of which not all bytes are there yet

log = logging.getLogger("casa.streaming")


@dataclass(frozen=True)
class Call:
    """What one session feeds.

    tokens: text around the frame. place: index of the token before which the frame stands; None if there is no frame.
    pixels: as the processor gave them, or what `looked_at` made of them; empty if there is no frame, or it has been fed
    already. pick: the next token, from logits (V,) and what has been said so far. stops: tokens that end a caption;
    stop: the one that stands for a caption that time or `most` cut short. most: tokens of the longest caption. draws:
    the generator that `pick` draws from. reads: the text of tokens. cut: asked before every token; once it says True,
    this caption ends where it is, but never before a word of it can be read: a machine that is too slow says little,
    not nothing, and only the model's own stop token is silence. said: of a caption that goes on, what an earlier pass
    said of it; its last token is the one to feed.
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
    reads: Callable[[Sequence[int]], str]
    cut: Callable[[], bool] | None = None
    said: Sequence[int] = ()


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
    settle()
    grid = pixels["image_grid_thw"].to(model.device)
    features = model.encode_images(pixels["pixel_values"].to(model.device), grid)
    if model.fusion.method == "insertion":
        return {"image_features": features, "image_grid_thw": grid}
    return {"image_keys_values": model.image_keys_values(features, grid), "image_grid_thw": grid}


@torch.no_grad()
def run_pass(
    model: CasaForConditionalGeneration, calls: Sequence[Call], halt: Callable[[], bool] | None = None
) -> Iterator[tuple[int, Said | Call]]:
    """Runs one call per session; yields each call's index and what it came to, as soon as that is known. The cache of a
    single call is gone on with; those of several are copied.

    halt: asked after every token; once it says True, the pass ends, and a caption that is half said comes to a call
    that goes on with it.
    """
    settle()
    alone = len(calls) == 1
    if alone:
        cache, before = calls[0].cache, torch.ones(1, calls[0].cache.num_text, dtype=torch.bool)
    else:
        cache, before = rows.join([call.cache for call in calls], model.new_cache())
    # what the model sees of its cache; of a row that has not finished, this is the session's own
    real = torch.cat([before, _valid(calls)], dim=1)
    logits = model(**_inputs(model, calls, None if alone else real), past_key_values=cache).logits[:, -1]

    def own(row: int) -> CasaCache:
        return cache if alone else rows.part(cache, row, real[row], model.new_cache())

    captions = [_Caption(call) for call in calls]
    while True:
        for row, caption in enumerate(captions):
            if caption.is_open and caption.take(logits[row]):
                yield row, Said(calls[row], caption.tokens, caption.pending, own(row), caption.whole)
        still = [row for row, caption in enumerate(captions) if caption.is_open]
        if not still or (halt is not None and halt()):
            break
        real = torch.cat([real, real.new_ones(len(calls), 1)], dim=1)
        logits = model(
            input_ids=torch.tensor([[caption.last] for caption in captions], device=model.device),
            attention_mask=None if alone else real.long().to(model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    for row in still:
        tokens = captions[row].tokens
        yield row, replace(calls[row], cache=own(row), tokens=tokens[-1:], pixels={}, said=tokens)


def run_together(model: CasaForConditionalGeneration, calls: Sequence[Call]) -> list[Said]:
    """What each of the calls comes to, in one pass that nothing halts."""
    said = {row: found for row, found in run_pass(model, calls) if isinstance(found, Said)}
    return [said[row] for row in range(len(calls))]


def run_each(
    model: CasaForConditionalGeneration, calls: Sequence[Call], halt: Callable[[], bool] | None = None
) -> Iterator[tuple[int, Said | Call | Exception]]:
    """`run_pass` for calls of which one may fail: if a pass over several does, those that are left have passes of their
    own, so that the culprit's error is nobody else's.
    """
    left = dict(enumerate(calls))
    draws = [call.draws.get_state() for call in calls]
    # rows of different ages do not fit together in a cache of which each keeps the newest only
    if len(calls) > 1 and not any(call.cache.slides for call in calls):
        try:
            for row, found in run_pass(model, calls, halt):
                del left[row]
                yield row, found
        except Exception:
            log.exception("a pass over %d sessions failed; each has one of its own", len(calls))
        for row, call in left.items():
            call.draws.set_state(draws[row])
    while left:
        # a token each in turn: nobody waits for a long caption here either
        for row, call in list(left.items()):
            try:
                ((_, found),) = run_pass(model, [call], halt if len(left) == 1 else lambda: True)
            except Exception as error:
                found = error
            if isinstance(found, Call):
                left[row] = found
            else:
                del left[row]
                yield row, found
        if halt is not None and halt():
            break
    yield from left.items()


class _Caption:
    """A caption while it is said."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.tokens = list(call.said)
        self.pending = -1
        self.whole = True

    @property
    def is_open(self) -> bool:
        return self.pending < 0

    @property
    def last(self) -> int:
        """The token to feed; one that has finished feeds its stop token, which nobody keeps."""
        return self.tokens[-1] if self.is_open else self._call.stop

    def take(self, logits: Tensor) -> bool:
        """Chooses the next token, unless the caption's time is over; True if it has ended."""
        call = self._call
        if len(self.tokens) == call.most:
            self.pending = call.stop
            return True
        # asked for the first token too: that is when a budget begins
        over = call.cut is not None and call.cut()
        if over and call.reads(self.tokens).rstrip(UNFINISHED):
            self.pending, self.whole = call.stop, False
            return True
        token = call.pick(logits, self.tokens)
        if token in call.stops:
            self.pending = token
        else:
            self.tokens.append(token)
        return not self.is_open


def _valid(calls: Sequence[Call]) -> Tensor:
    """bool (n, L), True where a row's token is real."""
    longest = max(len(call.tokens) for call in calls)
    return torch.arange(longest) >= torch.tensor([longest - len(call.tokens) for call in calls])[:, None]


def _inputs(model: CasaForConditionalGeneration, calls: Sequence[Call], real: Tensor | None) -> dict[str, Any]:
    """The first call of all rows, as the model takes it."""
    longest = max(len(call.tokens) for call in calls)
    ids = [[call.stop] * (longest - len(call.tokens)) + call.tokens for call in calls]
    places = [
        (row, longest - len(call.tokens) + call.place)
        for row, call in enumerate(calls)
        if call.place is not None and call.pixels
    ]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids), "use_cache": True, "logits_to_keep": 1}
    if real is not None:
        inputs["attention_mask"] = real.long()
    if places:
        inputs["image_positions"] = torch.tensor(places)
        inputs |= _pixels(model, [call.pixels for call in calls if call.pixels])
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _pixels(model: CasaForConditionalGeneration, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The frames of the pass, as the model takes them: if some have been looked at ahead, the others are now."""
    if any("pixel_values" not in pixels for pixels in given):
        given = [looked_at(model, pixels) if "pixel_values" in pixels else pixels for pixels in given]
    return {name: torch.cat([pixels[name] for pixels in given]) for name in given[0]}
