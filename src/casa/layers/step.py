"""One forward pass, as the CASA layers see it: given a layer's new queries, keys and values, its attention output.

Shapes: Q new text tokens (all rows, padding left out), T text tokens incl. the state's, N image tokens, Hq query
heads, Hkv key heads, D channels of a head, B rows.

`PackedStep` does any call: prefill, training, a later call that opens windows. `DecodeStep` does the call that
generation repeats, one new token per row and no new image, on buffers that it writes in place.
Both are passed to the layers explicitly; nothing is kept on modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from casa.attention import casa_attention
from casa.layers.plan import Plan
from casa.layers.rotary import Rotary, rotate, turner
from casa.layers.state import LayerWindow, WindowExtent, WindowState
from casa.windows import WindowLayout

Record = Callable[[int, Tensor, Tensor, Tensor, WindowLayout], None]
"""(layer ordinal, query (Q, Hq, D), text key (T, Hkv, D), image key (N, Hkv, D), layout), rotary applied."""


class Step(Protocol):
    """What a CASA layer needs of a forward pass."""

    tokens: Tensor | None  # (Q,) the real tokens among the flattened batch; None: all of them
    sees_image: Tensor  # bool (Q,)
    attend: str

    def attention(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """(Q, Hq, D) of layer number `layer`; key and value (Q, Hkv, D) are None if only images are keys."""
        ...


@dataclass
class PackedStep:
    """Any call, through the packed operation.

    images: keys and values (N', Hkv, D) of this call's new images, per layer, before rotary positions.
    rotary: None for plain cross-attention, which has no positions.
    """

    plan: Plan
    images: Sequence[tuple[Tensor, Tensor]]
    rotary: Rotary | None
    attend: str = "both"
    impl: str = "auto"
    state: WindowState | None = None
    record: Record | None = None
    next_state: WindowState | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        layout = self.plan.layout
        self.tokens: Tensor | None = self.plan.tokens
        device = self.plan.new_images.device
        self.sees_image = layout.on(device, "sees_image")
        self.turn = None
        self._text_rotation = self._image_rotation = None
        if self.rotary is not None:
            query = layout.on(device, "query_index")
            self._text_rotation = self.rotary(layout.on(device, "text_position")[query])
            positions = layout.on(device, "image_position")[self.plan.new_images]
            cos, sin = self.rotary(positions)
            # at the start of a window nothing turns, unless the backbone scales its rotary factors
            if bool(positions.any()) or bool((cos != 1).any()):
                self._image_rotation = cos, sin
            self.turn = turner(self.rotary) if layout.history else None
        if self.plan.keep is not None:
            self.next_state = WindowState(self.plan.keep.windows)

    def attention(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        layout = self.plan.layout
        image_key, image_value = self.images[layer]
        if self._text_rotation is not None:
            query = rotate(query, *self._text_rotation)
            key = None if key is None else rotate(key, *self._text_rotation)
        if self._image_rotation is not None:
            image_key = rotate(image_key, *self._image_rotation)
        if key is None or value is None:
            # nobody looks at text: a view that costs nothing stands in for its keys and values
            key = value = image_key.new_zeros(1, 1, 1).expand(query.shape[0], *image_key.shape[1:])
        if self.plan.join is not None and self.state is not None:
            held = self.state.layers[layer] if self.state.layers else None
            key, value, image_key, image_value = self._joined(held, key, value, image_key, image_value)
        if self.record is not None:
            self.record(layer, query, key, image_key, layout)
        out = casa_attention(
            query,
            key,
            value,
            image_key,
            image_value,
            layout,
            attend=self.attend,
            impl=self.impl,
            turn=self.turn,
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
        return (
            text(key, old_key),
            text(value, old_value),
            image(image_key, old_key),
            image(image_value, old_value),
        )

    def _kept(self, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor) -> LayerWindow:
        keep = self.plan.keep
        assert keep is not None
        room = 0 if self.attend == "image" else 16

        def buffer(image: Tensor, text: Tensor) -> Tensor:
            parts = [image[keep.image_index]]
            if self.attend != "image":
                rows = keep.text_index.shape[0]
                parts += [text[keep.text_index], text.new_zeros(rows, room, *text.shape[1:])]
            return torch.cat(parts, dim=1).transpose(1, 2).contiguous()

        return LayerWindow(buffer(image_key, key), buffer(image_value, value), keep.image_index.shape[1])


@dataclass
class DecodeStep:
    """One new token per row, in the window that is open; writes its key and value into the state."""

    state: WindowState
    rotary: Rotary | None
    device: torch.device
    attend: str = "both"

    def __post_init__(self) -> None:
        text, images = self.state.text_tokens, self.state.image_tokens
        self.tokens: Tensor | None = None
        self.sees_image = torch.tensor([n > 0 for n in images], device=self.device)
        self._text = torch.tensor(text, device=self.device)
        self._rows = torch.arange(len(text), device=self.device)
        self._same = text[0] if len(set(text)) == 1 else None
        self._longest = max(text)
        self._rotation = None if self.rotary is None else self.rotary(self._text)
        self._mask = None
        # after rows were selected the buffer may be wider than any row's images
        widest = self.state.layers[0].images
        if self._same is None or set(images) != {widest}:
            counts = torch.tensor(images, device=self.device)[:, None]
            if self.attend == "image":
                counts = counts.clamp(min=1)  # a row without image sees a slot whose result is thrown away
            image = torch.arange(widest, device=self.device) < counts
            now = torch.arange(self._longest + 1, device=self.device) <= self._text[:, None]
            parts = [image] if self.attend == "image" else [image, now]
            self._mask = torch.cat(parts, dim=1)[:, None, None]  # (B, 1, 1, keys)

    def attention(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        window = self.state.layers[layer]
        if self._rotation is not None:
            query = rotate(query, *self._rotation)
        stop = window.images
        if key is not None and value is not None:
            if self._rotation is not None:
                key = rotate(key, *self._rotation)
            window.unlock()
            while self._longest >= window.capacity:
                window.grow()
            if self._same is not None:
                window.key[:, :, stop + self._same] = key
                window.value[:, :, stop + self._same] = value
            else:
                window.key[self._rows, :, stop + self._text] = key
                window.value[self._rows, :, stop + self._text] = value
            stop += self._longest + 1
        if stop == 0:  # only images are keys, and no row has one
            return torch.zeros_like(query)
        heads = window.key.shape[1]
        # the query heads of a key head are queries of one attention: no key is copied
        grouped = query.unflatten(1, (heads, -1))
        out = F.scaled_dot_product_attention(
            grouped, window.key[:, :, :stop], window.value[:, :, :stop], attn_mask=self._mask
        )
        return out.flatten(1, 2)

    def finish(self) -> None:
        """Counts the new token, once all layers have run."""
        self.state.windows = [[*row[:-1], WindowExtent(row[-1].images, row[-1].text + 1)] for row in self.state.windows]

    @staticmethod
    def possible(state: WindowState | None, valid: Tensor, history: int) -> bool:
        """Whether a call over `valid` (B, L) without new images is one token per row in an open window."""
        return (
            state is not None
            and history == 0
            and not torch.is_grad_enabled()
            and valid.shape[1] == 1
            and len(state.layers) > 0
            and all(state.windows)
            and bool(valid.all())
        )


def _slots(buffer: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """The tokens (n, Hkv, D) at (rows, slots) of a buffer (B, Hkv, S, D)."""
    rows, slots = index
    return buffer[rows, :, slots]
