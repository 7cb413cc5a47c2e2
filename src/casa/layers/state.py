"""What CASA layers remember between calls: the images and the text of the visible windows, as keys and values.

Shapes: B rows, Hkv key heads, D channels of a head, I image slots, W text slots.
A row's images fill the first slots of the image part, its text the first slots of the text part:

    slot      0 ............. I-1 | I ................ I+W-1
    row 0     image image image . | text text .  .   .
    row 1     image .     .     . | text text text text .

Slots past a row's own lengths hold nothing that is ever read. The text part has room to grow, so that a
decoding step writes one slot and copies nothing.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from casa.errors import UserError


@dataclass(frozen=True)
class WindowExtent:
    """How many image and text tokens a window holds. behind: text behind its last image; all of it if there is none."""

    images: int
    text: int
    behind: int

    def longer(self, count: int) -> "WindowExtent":
        """With `count` more text tokens at its end, or fewer."""
        return WindowExtent(self.images, self.text + count, self.behind + count)


@dataclass
class LayerWindow:
    """Keys and values of one CASA layer, each (B, Hkv, I + capacity, D); `images` is I.

    Image keys are turned from the start of their own window. seen: with history, the same keys with those of earlier
    windows turned as the open one sees them; made when its first token is decoded, and text is written to both.
    """

    key: Tensor
    value: Tensor
    images: int
    seen: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.key.shape[2] - self.images

    def unlock(self) -> None:
        """Copies buffers that were made in inference mode: torch forbids writing into those outside of it."""
        if self.key.is_inference() and not torch.is_inference_mode_enabled():
            self.key, self.value, self.seen = self.key.clone(), self.value.clone(), None

    def grow(self, text: int) -> None:
        """Makes room for so many text tokens, and an eighth more."""
        room = text + max(16, text // 8) - self.capacity
        self.key = torch.nn.functional.pad(self.key, (0, 0, 0, room))
        self.value = torch.nn.functional.pad(self.value, (0, 0, 0, room))
        self.seen = None

    def seen_key(self, turn: Callable[[Tensor], Tensor]) -> Tensor:
        """`seen`, made by turning image keys (B * I, Hkv, D) if it is not there."""
        if self.seen is None:
            rows, images = self.key.shape[0], self.key[:, :, : self.images].transpose(1, 2)
            turned = turn(images.flatten(0, 1)).unflatten(0, (rows, -1)).transpose(1, 2)
            self.seen = torch.cat([turned, self.key[:, :, self.images :]], dim=2)
        return self.seen


@dataclass
class WindowState:
    """The visible windows of every row.

    `windows[b]` lists row b's visible windows, oldest first, the current one last. Images of all of them are
    held; text only of the current one, since no later token sees the text of a window that has closed.
    """

    windows: list[list[WindowExtent]]
    layers: list[LayerWindow] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.windows)

    @property
    def image_tokens(self) -> list[int]:
        """Image tokens held, per row."""
        return [sum(window.images for window in row) for row in self.windows]

    @property
    def text_tokens(self) -> list[int]:
        """Text tokens of the current window, per row."""
        return [row[-1].text if row else 0 for row in self.windows]

    @property
    def image_distances(self) -> list[int]:
        """For every image slot, row by row, how many text tokens before the open window its own starts; 0 if empty."""
        found: list[int] = []
        slots = max(self.image_tokens, default=0) if not self.layers else self.layers[0].images
        for row in self.windows:
            back, own = 0, []
            for window in reversed(row):
                back += 0 if window is row[-1] else window.text
                own = [-back] * window.images + own
            found += own + [0] * (slots - len(own))
        return found

    @property
    def image_bytes(self) -> int:
        """Bytes of the image keys and values that are held."""
        return sum(self.image_tokens) * self._token_bytes

    @property
    def text_bytes(self) -> int:
        """Bytes of the current windows' text keys and values; none where images are the only keys."""
        holds_text = bool(self.layers) and self.layers[0].capacity > 0
        return sum(self.text_tokens) * self._token_bytes if holds_text else 0

    @property
    def _token_bytes(self) -> int:
        return sum(2 * x.key.shape[1] * x.key.shape[3] * x.key.element_size() for x in self.layers)

    def twin(self) -> "WindowState":
        """The same windows in lists of their own, over the same buffers (see `CasaCache.twin`)."""
        return WindowState([list(row) for row in self.windows], [copy.copy(layer) for layer in self.layers])

    def forget_text(self) -> None:
        """Begins every row's open window again at its images: the text that comes next stands first behind them.

        Raises UserError for a window with images in the middle of its text.
        """
        if any(row and row[-1].behind < row[-1].text for row in self.windows):
            raise UserError("an image stands in the middle of this window; its text cannot be forgotten.")
        self.windows = [[*row[:-1], WindowExtent(row[-1].images, 0, 0)] if row else row for row in self.windows]

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows, as beams ask for; `rows` is int64 (B',)."""
        self.windows = [list(self.windows[row]) for row in rows.tolist()]
        for layer in self.layers:
            index = rows.to(layer.key.device)
            layer.key, layer.value = layer.key[index], layer.value[index]
            layer.seen = None if layer.seen is None else layer.seen[index]
