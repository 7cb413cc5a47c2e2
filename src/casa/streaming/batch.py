"""Steps of several sessions in one batch: what a session says is the same alone and in company.

Shapes: n sessions, S_i text tokens cached by session i, S the most of them, V vocabulary, Hkv key heads, D channels of
a head. Caches become rows of one, text padded on the left; images and text of the visible windows stand in slots of
their own, filled from the front (`WindowState`). A row is taken out as soon as its text has ended.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from casa.layers import LayerWindow, WindowState
from casa.models import CasaCache, CasaForConditionalGeneration
from casa.models.cache import Seen
from casa.models.image_cache import project_features
from casa.models.insertion import StreamState
from casa.streaming.sampling import decode
from casa.threads import settle
from casa.vision import token_grids

UNFINISHED = "\ufffd"  # how a tokenizer shows a character of which not all bytes are there yet
ROOM = 16  # text slots kept free behind a window, so that the first tokens of a caption copy nothing

ShouldStop = Callable[[], bool]
Images = dict[str, Tensor]
"""A frame: `image_grid_thw` (1, 3) with pixel_values, image_features or image_keys_values."""

log = logging.getLogger("casa.streaming")


@dataclass(frozen=True, eq=False)
class Look:
    """What the encoder made of a frame: the very same one for all frames that look alike.

    images: with pixel_values. features: (N, d_v). is_ahead: the frame was encoded before its turn.
    """

    images: Images
    features: Tensor
    is_ahead: bool = False


@dataclass(frozen=True)
class StepRequest:
    """What one session feeds."""

    cache: CasaCache
    tokens: list[int]  # text around the frame; none where the same was asked last: nothing runs
    image_index: int | None  # of the token before which the frame stands; None if there is no frame
    images: Images  # empty if there is no frame, or it is cached
    pick: Callable[[Tensor, list[int]], int]  # the next token, from logits (V,) and what has been said so far
    stops: frozenset[int]  # tokens that end a caption
    stop: int  # the one that stands for a caption that time or its length cut short
    max_new_tokens: int
    generator: torch.Generator  # what `pick` draws from
    to_text: Callable[[Sequence[int]], str]
    # Asked before every token; once it says True the caption ends, but never before a word of it can be read: a machine
    # that is too slow says little, not nothing, and only the model's own stop token is silence.
    should_stop: ShouldStop | None = None
    said: Sequence[int] = ()  # what an earlier batch said of this caption; its last token is the one to feed
    draft: Sequence[int] = ()  # what may be said, fed with the tokens: as far as it is, it takes one pass (`decode`)
    look: Look | None = None  # the frame's, where it is known


@dataclass(frozen=True)
class StepResult:
    """What a request came to."""

    request: StepRequest
    tokens: list[int]
    pending: int  # the token that ended the caption, chosen and not yet fed
    cache: CasaCache  # what the session goes on with
    complete: bool  # False if time cut the caption
    look: Look | None = None  # the frame's, if there was one


def encode_together(model: CasaForConditionalGeneration, frames: Sequence[Images]) -> list[Images]:
    """Frames with features in the place of pixels: all pixels go through the encoder in one batch."""
    fresh = [images for images in frames if "pixel_values" in images]
    if not fresh:
        return list(frames)
    pixels, grid = (torch.cat([images[name] for images in fresh]) for name in ("pixel_values", "image_grid_thw"))
    features = model.encode_images(pixels.to(model.device), grid.to(model.device))
    parts = iter(features.split([rows * columns for rows, columns in token_grids(model.config.encoder_config, grid)]))
    return [
        {"image_features": next(parts), "image_grid_thw": images["image_grid_thw"]}
        if "pixel_values" in images
        else images
        for images in frames
    ]


@torch.no_grad()
def run_batch(
    model: CasaForConditionalGeneration, requests: Sequence[StepRequest], should_yield: ShouldStop | None = None
) -> Iterator[tuple[int, StepResult | StepRequest]]:
    """Runs one request per session; yields the index of each and what it came to, as soon as that is known.

    `should_yield` is asked after every pass. Once it says True the batch ends; what is half said comes to a request
    that goes on with it. The cache of a single request is gone on with; those of several are copied.
    """
    settle()
    rows = [row for row, request in enumerate(requests) if request.tokens]
    for row, request in enumerate(requests):
        if not request.tokens:
            yield row, StepResult(request, [], request.stop, request.cache, complete=True)
    if not rows:
        return
    requests = [requests[row] for row in rows]
    alone = len(requests) == 1
    fed = [[*request.tokens, *request.draft] for request in requests]
    longest = max(map(len, fed))
    padded = [[request.stop] * (longest - len(row)) + row for row, request in zip(fed, requests, strict=True)]
    inputs = {"input_ids": torch.tensor(padded)}
    if alone:
        cache = requests[0].cache
    else:
        cache, cached = join([request.cache for request in requests], model.new_cache())
        inputs["attention_mask"] = torch.cat([cached, _right_aligned(list(map(len, fed)), longest)], dim=1).long()
    given = [request.images for request in requests if request.images]
    looks = [request.look for request in requests]
    if given:
        inputs["image_positions"] = torch.tensor(
            [
                (row, longest - len(fed[row]) + request.image_index)
                for row, request in enumerate(requests)
                if request.image_index is not None and request.images
            ]
        )
        given = encode_together(model, given)
        seen = [row for row, request in enumerate(requests) if request.images]
        for row, images in zip(seen, given, strict=True):
            if "pixel_values" in requests[row].images:
                looks[row] = Look(requests[row].images, images["image_features"])
        if any("image_keys_values" in images for images in given):
            # where some are projected already, the others are now
            given = [project_features(model, images) for images in given]
        inputs |= {name: torch.cat([images[name] for images in given]) for name in given[0]}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}

    def own(row: int) -> CasaCache:
        return cache if alone else part(cache, row, model.new_cache())

    captions = [_Caption(request) for request in requests]
    for ended in decode(model, inputs, cache, captions, drafts=dict(enumerate(request.draft for request in requests))):
        for row in ended:
            caption = captions[row]
            request, state = requests[row], own(row)
            result = StepResult(request, caption.tokens, caption.pending, state, caption.complete, looks[row])
            yield rows[row], result
        still = [row for row, caption in enumerate(captions) if caption.is_open]
        if still and should_yield is not None and should_yield():
            for row in still:
                said = {"tokens": captions[row].tokens[-1:], "said": captions[row].tokens, "draft": ()}
                yield rows[row], replace(requests[row], cache=own(row), images={}, look=looks[row], **said)
            return


def run_all(model: CasaForConditionalGeneration, requests: Sequence[StepRequest]) -> list[StepResult]:
    """What each of the requests comes to, in one batch that nothing ends early."""
    found = {row: result for row, result in run_batch(model, requests) if isinstance(result, StepResult)}
    return [found[row] for row in range(len(requests))]


def run_isolated(
    model: CasaForConditionalGeneration, requests: Sequence[StepRequest], should_yield: ShouldStop | None = None
) -> Iterator[tuple[int, StepResult | StepRequest | Exception]]:
    """`run_batch` for requests of which one may fail.

    If a batch of several fails, those that are left have batches of their own: the culprit's error is nobody else's.
    """
    left = dict(enumerate(requests))
    draws = [request.generator.get_state() for request in requests]
    # rows of different ages do not fit together in a cache of which each keeps the newest only
    if len(requests) > 1 and not any(request.cache.slides for request in requests):
        try:
            for row, found in run_batch(model, requests, should_yield):
                del left[row]
                yield row, found
        except Exception:
            log.exception("a batch of %d sessions failed; each has one of its own", len(requests))
        for row, request in left.items():
            request.generator.set_state(draws[row])
    while left:
        # a token each in turn: nobody waits for a long caption here either
        for row, request in list(left.items()):
            try:
                ((_, found),) = run_batch(model, [request], should_yield if len(left) == 1 else lambda: True)
            except Exception as error:
                found = error
            if isinstance(found, StepRequest):
                left[row] = found
            else:
                del left[row]
                yield row, found
        if should_yield is not None and should_yield():
            break
    yield from left.items()


class _Caption:
    """A caption or answer while it is generated."""

    def __init__(self, request: StepRequest) -> None:
        self._request = request
        self.tokens = list(request.said)
        self.pending = -1
        self.complete = True

    @property
    def is_open(self) -> bool:
        return self.pending < 0

    @property
    def last(self) -> int:
        """The token to feed; one that has ended feeds its stop token, which nobody keeps."""
        return self.tokens[-1] if self.is_open else self._request.stop

    def take(self, logits: Tensor) -> bool:
        request = self._request
        if len(self.tokens) == request.max_new_tokens:
            self.pending = request.stop
            return True
        # asked for the first token too: that is when a budget begins
        over = request.should_stop is not None and request.should_stop()
        if over and request.to_text(self.tokens).rstrip(UNFINISHED):
            self.pending, self.complete = request.stop, False
            return True
        token = request.pick(logits, self.tokens)
        if token in request.stops:
            self.pending = token
        else:
            self.tokens.append(token)
        return not self.is_open


def _right_aligned(lengths: Sequence[int], longest: int) -> Tensor:
    """bool (n, longest), True where a row of that length is, padded on the left."""
    return torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]


def join(caches: Sequence[CasaCache], empty: CasaCache) -> tuple[CasaCache, Tensor]:
    """Fills `empty` with a row per cache (of one row each); it, and the mask (n, S) of its text, True where real."""
    lengths = [cache.num_text for cache in caches]
    longest = max(lengths)
    mask = _right_aligned(lengths, longest)
    empty.num_text, empty.mask = longest, None if mask.all() else mask
    if any(cache.seen for cache in caches):
        seen = [cache.seen[0] if cache.seen else Seen() for cache in caches]
        empty.seen = [one.moved(longest - length) for one, length in zip(seen, lengths, strict=True)]
    for index in range(max(len(cache.text.layers) for cache in caches)):
        rows = [text_of(cache, index) for cache in caches]
        if (like := next((row for row in rows if row is not None), None)) is not None:
            filled = [row or (like[0][:, :, :0], like[1][:, :, :0]) for row in rows]
            width = max(keys.shape[2] for keys, _ in filled)
            keys, values = (
                torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in side]) for side in zip(*filled, strict=True)
            )
            empty.text.update(keys, values, index)
    streams = [cache.stream for cache in caches if cache.stream is not None]
    if len(streams) == len(caches):
        width = max(stream.mask.shape[1] for stream in streams)
        empty.stream = StreamState(
            torch.cat([pad(stream.mask, (width - stream.mask.shape[1], 0)) for stream in streams]),
            torch.cat([stream.next_position for stream in streams]),
            torch.cat([stream.images for stream in streams]),
        )
    empty.windows = _joined_windows([cache.windows for cache in caches])
    return empty, mask


def part(cache: CasaCache, row: int, empty: CasaCache) -> CasaCache:
    """Row `row` of a joined cache as a cache of its own, filled into `empty`."""
    slots = kept = cache.known[row]
    empty.num_text = int(kept.sum())
    if cache.seen:
        empty.seen = [cache.seen[row].moved(-int((~kept[: cache.seen[row].column]).sum()))]
    if (stream := cache.stream) is not None:
        slots = stream.mask[row].nonzero().flatten()
        empty.stream = StreamState(
            torch.ones(1, len(slots), dtype=torch.bool, device=slots.device),
            stream.next_position[row : row + 1].clone(),
            stream.images[row : row + 1].clone(),
        )
    for index in range(len(cache.text.layers)):
        if (found := text_of(cache, index)) is not None:
            keys, values = (x[row : row + 1, :, slots.to(x.device)] for x in found)
            empty.text.update(keys, values, index)
    if cache.windows is not None:
        empty.windows = _part_of_windows(cache.windows, row)
    return empty


def text_of(cache: CasaCache, index: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values, (n, Hkv, S, D) each, of a block's text; None if it has none."""
    layer = cache.text.layers[index] if index < len(cache.text.layers) else None
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return None if keys is None or values is None or keys.dim() < 4 else (keys, values)


def _joined_windows(states: Sequence[WindowState | None]) -> WindowState | None:
    """A session that has seen no image yet has no window; its row is empty."""
    given = [state for state in states if state is not None]
    if not given:
        return None
    windows = [list(state.windows[0]) if state is not None else [] for state in states]
    images = max(sum(w.images for w in row) for row in windows)
    layers = []
    for index, like in enumerate(given[0].layers):
        rows = [state.layers[index] if state is not None else None for state in states]
        holds_text = any(row is not None and row.capacity > 0 for row in rows)
        text = max((row[-1].text for row in windows if row), default=0) + ROOM if holds_text else 0
        shape = (len(rows), like.key.shape[1], images + text, like.key.shape[3])
        key, value = like.key.new_zeros(shape), like.value.new_zeros(shape)
        for number, (layer, extents) in enumerate(zip(rows, windows, strict=True)):
            if layer is None or not extents:
                continue
            own, said = sum(w.images for w in extents), extents[-1].text if holds_text else 0
            for new, old in ((key, layer.key), (value, layer.value)):
                new[number, :, :own] = old[0, :, :own]
                new[number, :, images : images + said] = old[0, :, layer.images : layer.images + said]
        layers.append(LayerWindow(key, value, images))
    return WindowState(windows, layers)


def _part_of_windows(state: WindowState, row: int) -> WindowState:
    extents = list(state.windows[row])
    own, said = sum(window.images for window in extents), extents[-1].text if extents else 0
    layers = []
    for layer in state.layers:
        stop = layer.images + min(said + ROOM, layer.capacity)
        key, value = (
            torch.cat([x[row : row + 1, :, :own], x[row : row + 1, :, layer.images : stop]], dim=2)
            for x in (layer.key, layer.value)
        )
        layers.append(LayerWindow(key, value, own))
    return WindowState([extents], layers)
