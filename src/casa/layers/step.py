"""One forward pass, as the CASA layers see it: given a layer's new queries, keys and values, its attention output.

Shapes: Q new text tokens (all rows, padding left out), T text tokens incl. the state's, N image tokens, Hq query
heads, Hkv key heads, D channels of a head, B rows.

`PackedStep` does any call: prefill, training, a later call that opens windows. `DecodeStep` does the call that
generation repeats, new tokens and no new image, on buffers that it writes in place; `FrameStep` the call that brings a
live session's next frame, as two of these.
They are passed to the layers explicitly; nothing is kept on modules.

Rotary positions: `cos` and `sin` are (T, D), as the backbone's own rotary module makes them, so every scaling rule of
the backbone (linear, YaRN, Llama 3 ...) comes along.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention import bias_of, casa_attention
from casa.layers.ablation import Ablation
from casa.layers.plan import CallPlan
from casa.layers.state import LayerWindow, WindowExtent, WindowState
from casa.windows import WindowLayout

Made = TypeVar("Made")
ROOM = 16  # slots for text behind a window's images, at first


@dataclass(frozen=True)
class Rotation:
    """How far the tokens turn: cos and sin (T, D), or (T, H, D) where heads differ.

    Which channels turn together: the two halves of a head, channel c with c + D / 2, in most backbones;
    neighbours, channel 2c with 2c + 1, if `neighbours` (Helium).
    """

    cos: Tensor
    sin: Tensor
    neighbours: bool = False

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of the pairs that turn together: (T, 1 or H, 2, D / 2), or (.., D / 2, 2)."""
        pairs = [x[:, None] if x.dim() == 2 else x for x in (self.cos, self.sin)]
        cos, sin = (x.unflatten(-1, (-1, 2) if self.neighbours else (2, -1)) for x in pairs)
        pair = -1 if self.neighbours else -2
        # the first of a pair is turned against the second; numbers from Python would be no part of a CUDA graph
        first, second = sin.unbind(pair)
        return cos, torch.stack([-first, second], dim=pair)

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x (T, H, D)."""
        cos, sin = self._factors
        pairs = x.unflatten(-1, cos.shape[2:])
        across = pairs.flip(-1 if self.neighbours else -2) * sin
        return across.add_(pairs * cos).flatten(-2)

    def beside(self, turned: int, still: int) -> "Rotation":
        """Of so many heads, and so many behind them that stay as they are."""
        tokens, width = self.cos.shape

        def all_of(factor: Tensor, rest: float) -> Tensor:
            one = factor[:, None].expand(-1, turned, -1)
            return torch.cat([one, factor.new_full((1, 1, 1), rest).expand(tokens, still, width)], dim=1)

        return Rotation(all_of(self.cos, 1.0), all_of(self.sin, 0.0), self.neighbours)

    @property
    def turns_nothing(self) -> bool:
        """Whether it leaves everything as it is: position 0, unless the backbone scales its rotary factors."""
        return not bool(self.sin.any()) and bool((self.cos == 1).all())


Rotary = Callable[[Tensor], Rotation]
"""int64 positions, (T,) or one row per axis (axes, T) -> the rotation of T tokens."""


class Turner:
    """Moves already rotated keys (n, H, D) by whole numbers of positions.

    Rotations add up, so a key at position p turned by d is the key at p + d. The scale that some rotary
    rules put on cos and sin is already in the key and is divided out. Keys without rotary positions stay.
    """

    def __init__(self, rotary: Rotary | None) -> None:
        self._rotary = rotary
        self._made: tuple[Tensor, Rotation] | None = None

    def __call__(self, key: Tensor, distance: int) -> Tensor:
        """All by one distance."""
        return key if distance == 0 else self.each(key, torch.tensor([distance], device=key.device))

    def each(self, key: Tensor, distances: Tensor) -> Tensor:
        """Every key by its own, int64 (n,). The rotation is made once for all layers that bring the same tensor."""
        if self._rotary is None:
            return key
        if self._made is None or self._made[0] is not distances:
            both = self._rotary(torch.cat([distances.new_zeros(1), distances]))
            scale = both.cos[:1, :1]
            self._made = distances, Rotation(both.cos[1:] / scale, both.sin[1:] / scale, both.neighbours)
        return self._made[1](key)


AttentionRecorder = Callable[[int, Tensor, Tensor, Tensor, WindowLayout], None]
"""(layer ordinal, query (Q, Hq, D), text key (T, Hkv, D), image key (N, Hkv, D), layout), rotary applied; scores are
query times key over sqrt(D), whatever the backbone's own scale."""


class Step(Protocol):
    """What a CASA layer needs of a forward pass."""

    tokens: Tensor | None  # (Q,) the real tokens among the flattened batch; None: all of them
    sees_image: Tensor | None  # bool (Q,); None: all of them do
    attend: str
    record: AttentionRecorder | None

    def attention(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """(Q, Hq, D) of layer number `layer`; key and value (Q, Hkv, D) are None if only images are keys.

        Args:
            scale: Of the scores; D ** -0.5 if None.
        """
        ...


@dataclass
class PackedStep:
    """Any call, through the packed operation.

    Attributes:
        images: Keys and values (N', Hkv, D) of this call's new images, per layer, before rotary positions.
        rotary: Per layer; None where there are no positions (plain cross-attention, blocks without rotary positions).
        image_grid: int64 (2, N'), row and column of each new image token, for backbones whose rotary positions have
            three axes (mRoPE); None for the others.
    """

    plan: CallPlan
    images: Sequence[tuple[Tensor, Tensor]]
    rotary: Sequence[Rotary | None]
    image_grid: Tensor | None = None
    attend: str = "both"
    state: WindowState | None = None
    record: AttentionRecorder | None = None
    ablation: Ablation | None = None
    next_state: WindowState | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        layout = self.plan.layout
        self.tokens: Tensor | None = self.plan.tokens
        device = self.plan.new_images.device
        self.sees_image = None if bool(layout.sees_image.all()) else layout.on(device, "sees_image")
        self._turners = per_rotary(self.rotary, Turner) if layout.history else [None] * len(self.rotary)
        text = layout.on(device, "text_position")[layout.on(device, "query_index")]
        image = layout.on(device, "image_position")[self.plan.new_images]
        if self.image_grid is not None:
            image = torch.cat([image[None], image + self.image_grid])
        self._rotations = per_rotary(self.rotary, lambda rotary: (rotary(text), _needed(rotary(image))))
        if self.plan.keep is not None:
            self.next_state = WindowState(self.plan.keep.windows)

    def finish(self) -> WindowState | None:
        """What later calls need, once all layers have run."""
        return self.next_state

    def attention(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, scale: float | None = None
    ) -> Tensor:
        layout = self.plan.layout
        image_key, image_value = self.images[layer]
        if (rotations := self._rotations[layer]) is not None:
            turn_text, turn_image = rotations
            query = turn_text(query)
            key = None if key is None else turn_text(key)
            image_key = image_key if turn_image is None else turn_image(image_key)
        if key is None or value is None:
            # nobody looks at text: a view that costs nothing stands in for its keys and values
            key = value = image_key.new_zeros(1, 1, 1).expand(query.shape[0], *image_key.shape[1:])
        if self.plan.join is not None and self.state is not None:
            held = self.state.layers[layer] if self.state.layers else None
            key, value, image_key, image_value = self._joined(held, key, value, image_key, image_value)
        if self.record is not None:
            usual = 1.0 if scale is None else scale * query.shape[-1] ** 0.5
            self.record(layer, query * usual, key, image_key, layout)
        attend = casa_attention if self.ablation is None else partial(self.ablation.attention, layer)
        out = attend(
            query,
            key,
            value,
            image_key,
            image_value,
            layout,
            scale=scale,
            attend=self.attend,
            turn=self._turners[layer],
        )
        if self.next_state is not None:
            self.next_state.layers.append(self._kept(key, value, image_key, image_value))
        return out

    def _joined(
        self, held: LayerWindow | None, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        join = self.plan.join
        assert join is not None
        zero = torch.zeros_like(key[:1]) if len(key) else key.new_zeros(1, *key.shape[1:])

        def text(new: Tensor, old: Tensor | None) -> Tensor:
            parts = [zero, new] if old is None or self.attend == "image" else [zero, _slots(old, join.text_slots), new]
            if self.attend == "image":
                return zero[:1].expand(len(join.text_order), *new.shape[1:])
            return torch.cat(parts)[join.text_order]

        def image(new: Tensor, old: Tensor | None) -> Tensor:
            return new if old is None else torch.cat([_slots(old, join.image_slots), new])[join.image_order]

        old_key, old_value = (held.key, held.value) if held is not None else (None, None)
        return (text(key, old_key), text(value, old_value), image(image_key, old_key), image(image_value, old_value))

    def _kept(self, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor) -> LayerWindow:
        keep = self.plan.keep
        assert keep is not None
        room = 0 if self.attend == "image" else ROOM

        def buffer(image: Tensor, text: Tensor) -> Tensor:
            parts = [image[keep.image_index]]
            if self.attend != "image":
                rows = keep.text_index.shape[0]
                parts += [text[keep.text_index], text.new_zeros(rows, room, *text.shape[1:])]
            return torch.cat(parts, dim=1).transpose(1, 2).contiguous()

        return LayerWindow(buffer(image_key, key), buffer(image_value, value), keep.image_index.shape[1])


@dataclass
class DecodeStep:
    """`length` new tokens per row, in the window that is open; writes their keys and values into the state."""

    state: WindowState
    rotary: Sequence[Rotary | None]
    device: torch.device
    attend: str = "both"
    length: int = 1

    def __post_init__(self) -> None:
        self._turners: list[Callable[[Tensor], Tensor] | None] = [None] * len(self.rotary)
        if any(distances := self.state.image_distances):
            back = torch.tensor(distances, device=self.device)
            self._turners = per_rotary(self.rotary, lambda rotary: partial(Turner(rotary).each, distances=back))
        text, images = self.state.text_tokens, self.state.image_tokens
        self.tokens: Tensor | None = None
        self.sees_image = None
        if not all(images):
            self.sees_image = torch.tensor([n > 0 for n in images for _ in range(self.length)], device=self.device)
        self.record: AttentionRecorder | None = None
        new = torch.arange(self.length, device=self.device)
        self._places = torch.tensor(text, device=self.device)[:, None] + new  # (B, length), in the window
        self._rows = torch.arange(len(text), device=self.device)[:, None]
        self._same = text[0] if len(set(text)) == 1 else None
        self._stop = max(text) + self.length
        self._biases: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def has_history(self) -> bool:
        """Whether images of earlier windows are in sight."""
        return any(turner is not None for turner in self._turners)

    @property
    def places(self) -> Tensor:
        """int64 (B,), of each row's first new token among its window's text."""
        return self._places[:, 0]

    @property
    def image_counts(self) -> Tensor:
        """int64 (B,): images that each row sees; 1 of a row without where only images are keys, whose result is
        thrown away.
        """
        counts = torch.tensor(self.state.image_tokens, device=self.device)
        return counts.clamp(min=1) if self.attend == "image" else counts

    @cached_property
    def _rotations(self) -> list[Rotation | None]:
        return per_rotary(self.rotary, lambda rotary: rotary(self._places.flatten()))

    @cached_property
    def _mask(self) -> Tensor | None:
        """What each new token sees, bool (B, 1, length, keys); None if all of it."""
        # after rows were selected the buffer may be wider than any row's images
        widest, only_images = self.state.layers[0].images, self.attend == "image"
        if set(self.state.image_tokens) == {widest} and (only_images or (self._same is not None and self.length == 1)):
            return None
        counts = self.image_counts[:, None, None]
        image = (torch.arange(widest, device=self.device) < counts).expand(-1, self.length, -1)
        now = torch.arange(self._stop, device=self.device) <= self._places[..., None]
        return torch.cat([image] if only_images else [image, now], dim=2)[:, None]

    @classmethod
    def opening(
        cls,
        images: Sequence[tuple[Tensor, Tensor]],
        counts: Sequence[int],
        rotary: Sequence[Rotary | None],
        grid: Tensor | None,
        attend: str,
        length: int,
    ) -> "DecodeStep":
        """Behind new images alone, `counts` tokens of them in each row. images, rotary, grid: as in `PackedStep`."""
        where = images[0][0].new_zeros(sum(counts), dtype=torch.int64)
        if grid is not None:
            where = torch.cat([where[None], grid])
        turns = per_rotary(rotary, lambda rotation: _needed(rotation(where)))
        room, widest = 0 if attend == "image" else length + ROOM, max(counts)

        def buffer(image: Tensor) -> Tensor:
            held = image.new_zeros(len(counts), image.shape[1], widest + room, image.shape[2])
            for row, part in zip(held, image.split(list(counts)), strict=True):
                row[:, : len(part)] = part.transpose(0, 1)
            return held

        layers = [
            LayerWindow(buffer(key if turn is None else turn(key)), buffer(value), widest)
            for (key, value), turn in zip(images, turns, strict=True)
        ]
        state = WindowState([[WindowExtent(count, 0, 0)] for count in counts], layers)
        return cls(state, rotary, where.device, attend, length)

    def attention(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, scale: float | None = None
    ) -> Tensor:
        window = self.state.layers[layer]
        rotation = self._rotations[layer]
        if rotation is not None:
            query = rotation(query)
        stop, turn = window.images, self._turners[layer]
        if key is not None and value is not None:
            if rotation is not None:
                key = rotation(key)
            window.unlock()
            if self._stop > window.capacity:
                window.grow(self._stop)
            held = [(window.key, key), (window.value, value)]
            held += [] if turn is None else [(window.seen_key(turn), key)]
            for buffer, new in held:
                new = new.unflatten(0, self._places.shape)
                if self._same is not None:
                    buffer.narrow(2, stop + self._same, self.length).copy_(new.transpose(1, 2))
                else:
                    buffer[self._rows, :, stop + self._places] = new
            stop += self._stop
        if stop == 0:  # only images are keys, and no row has one
            return torch.zeros_like(query)
        keys = window.key if turn is None else window.seen_key(turn)
        rows, heads, _, width = keys.shape
        # the query heads of a key head are queries of one attention: no key is copied
        grouped = query.view(rows, self.length, heads, -1, width).transpose(1, 2).flatten(2, 3)
        bias = self._bias(grouped.shape[2] // self.length, query.dtype)
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, :stop], window.value[:, :, :stop], attn_mask=bias, scale=scale
        )
        return out.unflatten(2, (self.length, -1)).transpose(1, 2).reshape(query.shape)

    def _bias(self, groups: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (B, 1, length * groups, keys), once for all layers; None if all see all."""
        if self._mask is None:
            return None
        if (groups, dtype) not in self._biases:
            self._biases[groups, dtype] = bias_of(self._mask, dtype).repeat_interleave(groups, 2)
        return self._biases[groups, dtype]

    def then(self, new: "DecodeStep") -> "DecodeStep":
        """For text of which the first part, in each row, is this step's, and the rest stands in `new` windows."""
        return FrameStep(self, new)

    def finish(self) -> WindowState:
        """Counts the new tokens, once all layers have run."""
        self.state.windows = [[*row[:-1], row[-1].longer(self.length)] for row in self.state.windows]
        return self.state

    @staticmethod
    def possible(state: WindowState | None, valid: Tensor) -> bool:
        """Whether a call over `valid` (B, L) without new images is of tokens in open windows, as many in every row."""
        return (
            state is not None
            and not torch.is_grad_enabled()
            and len(state.layers) > 0
            and all(state.windows)
            and bool(valid.all())
        )


class FrameStep(DecodeStep):
    """Text around a frame, as much in each row: some in the windows that close, the rest in those that open."""

    def __init__(self, old: DecodeStep, new: DecodeStep) -> None:
        self._old, self._new, self.attend, self.length = old, new, new.attend, old.length + new.length
        self.tokens = self.record = self.sees_image = None
        if old.sees_image is not None:
            self.sees_image = F.pad(old.sees_image.view(-1, old.length), (0, new.length), value=True).flatten()

    def attention(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, scale: float | None = None
    ) -> Tensor:
        found, first, given = [], 0, (query, key, value)
        for step in (self._old, self._new):
            own = slice(first, first := first + step.length)
            q, k, v = (x if x is None else x.unflatten(0, (-1, self.length))[:, own].flatten(0, 1) for x in given)
            found.append(step.attention(layer, cast(Tensor, q), k, v, scale).unflatten(0, (-1, step.length)))
        return torch.cat(found, dim=1).flatten(0, 1)

    def finish(self) -> WindowState:
        return self._new.finish()


def per_rotary(rotaries: Sequence[Rotary | None], compute: Callable[[Rotary], Made]) -> list[Made | None]:
    """compute(rotary) for each layer, once for layers that share one; None where there is none."""
    found: dict[int, Made] = {}
    for rotary in rotaries:
        if rotary is not None and id(rotary) not in found:
            found[id(rotary)] = compute(rotary)
    return [None if rotary is None else found[id(rotary)] for rotary in rotaries]


def _needed(rotation: Rotation) -> Rotation | None:
    """None for a rotation that would change nothing: at the start of a window images are not turned."""
    return None if rotation.turns_nothing else rotation


def _slots(buffer: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """The tokens (n, Hkv, D) at (rows, slots) of a buffer (B, Hkv, S, D)."""
    rows, slots = index
    return buffer[rows, :, slots]
