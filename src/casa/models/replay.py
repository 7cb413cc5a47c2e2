"""A token without launches: on a GPU, one token of every row is captured as a CUDA graph and replayed for the next.

A small model's token is hundreds of kernels of a few microseconds each, and Python takes longer to launch them than
they take to run. A graph is launched once. It repeats the same kernels at the same addresses, so what differs from one
token to the next stands in tensors that stay where they are:

    text of every block     slot  0 ... S-1 held | S new | room                as long as the buffer of its cache
    open window             slot  0 ... I-1 image | I ... text | new | room    kept over frames: a frame is copied in

All of the room is attended under a bias that hides what is not there yet. One cache has one graph. What outgrows it,
other rows and other weights give it up, and it is made again after a few tokens. A cache's twin takes it along. A cache
that is joined of several sessions for one caption does not live long enough for one.

Shapes: B rows, Hkv key heads, D channels of a head, d width of the text model.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import ReferenceType, WeakSet, ref

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention import bias_of
from casa.layers import AttentionRecorder, DecodeStep, LayerWindow, Step, per_rotary

if TYPE_CHECKING:
    from casa.models.cache import CasaCache, GrowingLayer

PATIENCE = 4  # tokens at the same addresses before they are captured: capturing costs about two
AHEAD = 128  # tokens that buffers have room for when they are captured

log = logging.getLogger(__name__)
_side: dict[int, Any] = {}  # of each device the stream on which tokens are captured
_refused: WeakSet[object] = WeakSet()  # whose tokens cannot be captured
_launched: ContextVar[bool] = ContextVar("_launched", default=False)

Through = Callable[[Tensor, Tensor, Tensor, Sequence[Any], Step | None], Tensor]
"""(embeddings (B, 1, d), positions (B, 1), bias (B, 1, 1, room), text of every block, step) -> (B, 1, d)"""


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """What launches again all that `run` launches, and the tensor it leaves its result in. Runs it twice."""
    device = torch.cuda.current_device()
    if device not in _side:
        _side[device] = torch.cuda.Stream()
    side, graph = _side[device], torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # what is allocated or chosen at a first call must be so before
        run()
        # images are encoded in another thread meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            found = run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay, found


@contextmanager
def launched() -> Iterator[None]:
    """Inside, every token is launched, for whoever compares."""
    before = _launched.set(True)
    try:
        yield
    finally:
        _launched.reset(before)


def is_replayed(x: Tensor) -> bool:
    """Whether tokens on this tensor's device are worth a graph."""
    return x.is_cuda and not _launched.get()


class Replays:
    """A cache's captured token, if it has one yet. Deep copies of the cache begin without."""

    def __init__(self) -> None:
        self._graph: _Graph | None = None
        self._count, self._rows, self._of = 0, 0, cast(object, None)

    def __deepcopy__(self, memo: object) -> "Replays":
        return Replays()

    def __reduce__(self) -> tuple[type["Replays"], tuple[()]]:
        return Replays, ()

    def lend(self, windows: Sequence[LayerWindow]) -> None:
        """Notes that others than the cache that goes on hold these windows, whose buffers may be the graph's."""
        if self._graph is not None and (held := self._graph.windows) is not None:
            # what is gone is let go: days of a picture that stays the same evict nothing
            held.lent = [*(one for one in held.lent if one() is not None), *map(ref, windows)]

    def token(
        self,
        through: Through,
        owner: object,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: "CasaCache",
        step: Step | None,
    ) -> Tensor | None:
        """One token of every row (B, 1, d), its keys and values written; None if it has to be launched.

        What is given is written over by the next token.

        Args:
            through: The way of a token; what is captured.
            owner: What `through` belongs to; another one captures anew.
            mask: bool (B, S + 1), which of the cached text and the token are real; None if all are.
            step: The open windows'. Images of earlier ones that are in sight are not captured.
        """
        if step is not None and (type(step) is not DecodeStep or step.has_history):
            return None
        if self._of is not owner or self._rows != len(embeds):
            self._of, self._rows, self._graph, self._count = owner, len(embeds), None, 0
        if self._graph is not None and not self._graph.fits(cache, step):
            self._graph, self._count = None, 0
        if self._graph is None:
            self._count += 1
            if self._count <= PATIENCE or self._of in _refused:
                return None
            try:
                with torch.cuda.device_of(embeds):
                    self._graph = _Graph(through, embeds, positions, cache, step)
            except RuntimeError as error:
                log.warning("a token cannot be captured here, and is launched: %s", error)
                _refused.add(self._of)
                return None
        with torch.cuda.device_of(embeds):
            return self._graph(embeds, positions, mask, cache, step)


@dataclass(frozen=True)
class _Text:
    """A block's text (2, B, Hkv, room, D), of which it writes one token at `slot` (1,); as a `GrowingLayer`."""

    buffer: Tensor
    slot: Tensor

    def add(self, new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of all the room."""
        self.buffer.index_copy_(3, self.slot, new)
        return self.buffer.unbind()


class _Windows:
    """The open windows of every row in buffers that stay; a `Step` of one token."""

    tokens: Tensor | None = None
    record: AttentionRecorder | None = None

    def __init__(self, step: DecodeStep) -> None:
        state, self.attend, self.rotary = step.state, step.attend, step.rotary
        first = state.layers[0]
        self._room = first.images + (0 if self.attend == "image" else max(state.text_tokens) + AHEAD)
        self.lent: list[ReferenceType[LayerWindow]] = []
        self._held = [LayerWindow(self._buffer(x.key), self._buffer(x.value), 0) for x in state.layers]
        rows, device = state.num_rows, step.device
        self._places = torch.zeros(rows, dtype=torch.int64, device=device)  # in the window
        self._slots = torch.zeros_like(self._places)  # in the buffer
        self._there = torch.zeros(rows, self._room, dtype=torch.bool, device=device)  # False: no image, and never text
        if self.attend == "image":
            self._slots.fill_(self._room)  # no image stands behind it
        self._rows, self._columns = torch.arange(rows, device=device), torch.arange(self._room, device=device)
        self.sees_image = None if step.sees_image is None else step.sees_image.clone()

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_zeros(*like.shape[:2], self._room, like.shape[3])

    def fits(self, step: DecodeStep) -> bool:
        layer = step.state.layers[0]
        needed = layer.images + (0 if self.attend == "image" else max(step.state.text_tokens) + 1)
        alike = (step.sees_image is None) == (self.sees_image is None) and step.attend == self.attend
        return alike and needed <= self._room and layer.key.dtype == self._held[0].key.dtype

    def place(self, step: DecodeStep) -> None:
        """Where the next token goes. A frame, or anything else that made new buffers, is copied in first."""
        state, images = step.state, step.state.layers[0].images
        if any(layer.key is not held.key for layer, held in zip(state.layers, self._held, strict=True)):
            self._evict()
            for layer, held in zip(state.layers, self._held, strict=True):
                for mine, theirs in ((held.key, layer.key), (held.value, layer.value)):
                    count = min(theirs.shape[2], self._room)
                    mine[:, :, :count].copy_(theirs[:, :, :count])
                layer.key, layer.value, layer.seen = held.key, held.value, None
            shown = self._columns < step.image_counts[:, None]
            self._there.copy_(shown if self.attend == "image" else shown | (self._columns >= images))
            if self.sees_image is not None and step.sees_image is not None:
                self.sees_image.copy_(step.sees_image)
        self._places.copy_(step.places)
        if self.attend != "image":
            self._slots.copy_(step.places + images)

    def _evict(self) -> None:
        """Gives what a cache that did not go on still holds of the buffers a copy of its own."""
        mine = {id(held.key) for held in self._held}
        for layer in filter(None, (found() for found in self.lent)):
            if id(layer.key) in mine:
                layer.key, layer.value = layer.key.clone(), layer.value.clone()
        self.lent.clear()

    def begin(self) -> None:
        """What all layers share of a token; captured with it."""
        self._rotations = per_rotary(self.rotary, lambda rotary: rotary(self._places))
        visible = self._there & (self._columns <= self._slots[:, None])
        self._bias = bias_of(visible, self._held[0].key.dtype)[:, None, None]

    def attention(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, scale: float | None = None
    ) -> Tensor:
        held, rotation = self._held[layer], self._rotations[layer]
        if rotation is not None:
            query = rotation(query)
        if key is not None and value is not None:
            held.key[self._rows, :, self._slots] = key if rotation is None else rotation(key)
            held.value[self._rows, :, self._slots] = value
        rows, heads, _, width = held.key.shape
        # the query heads of a key head are queries of one attention: no key is copied
        grouped = query.view(rows, heads, -1, width)
        out = F.scaled_dot_product_attention(grouped, held.key, held.value, attn_mask=self._bias, scale=scale)
        return out.reshape(query.shape)


class _Graph:
    """One token of every row, captured, and the tensors that it reads and writes."""

    def __init__(
        self, through: Through, embeds: Tensor, positions: Tensor, cache: "CasaCache", step: DecodeStep | None
    ) -> None:
        layers = _text_of(cache)
        self._embeds, self._positions = embeds.clone(), positions.clone()
        self._slot = positions.new_full((1,), cache.text.get_seq_length())
        buffers = [layer.reserve(AHEAD) if layer.is_initialized else None for layer in layers]
        self._held = {index: held for index, held in enumerate(buffers) if held is not None}
        self._room = min(held.shape[3] for held in self._held.values())
        self._is_padded = False
        self._real = torch.ones(len(embeds), self._room, dtype=torch.bool, device=embeds.device)
        self.windows = None if step is None else _Windows(step)
        if step is not None:
            cast(_Windows, self.windows).place(step)
        text = [None if held is None else _Text(held.narrow(3, 0, self._room), self._slot) for held in buffers]
        columns = torch.arange(self._room, device=embeds.device)

        def run() -> Tensor:
            visible = self._real & (columns <= self._slot)
            if self.windows is not None:
                self.windows.begin()
            bias = bias_of(visible, embeds.dtype)[:, None, None]
            return through(self._embeds, self._positions, bias, text, self.windows)

        self._replay, self._found = capture(run)

    def fits(self, cache: "CasaCache", step: DecodeStep | None) -> bool:
        """Whether cache and windows are where they were captured, with room for a token."""
        if self.windows is None or step is None:
            alike = self.windows is None and step is None
        else:
            alike = self.windows.fits(step)
        layers = _text_of(cache)
        return alike and all(layers[index].room_is(held) for index, held in self._held.items())

    def __call__(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: "CasaCache", step: DecodeStep | None
    ) -> Tensor:
        held = cache.text.get_seq_length()
        self._embeds.copy_(embeds)
        self._positions.copy_(positions)
        self._slot.fill_(held)
        if mask is not None:
            self._real[:, : held + 1].copy_(mask)
        elif self._is_padded:
            self._real.fill_(True)
        self._is_padded = mask is not None
        if self.windows is not None and step is not None:
            self.windows.place(step)
        self._replay()
        layers = _text_of(cache)
        for index in self._held:
            layers[index].written(1)
        return self._found


def _text_of(cache: "CasaCache") -> "list[GrowingLayer]":
    return cast("list[GrowingLayer]", cache.text.layers)
