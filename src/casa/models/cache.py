"""The cache of a CASA model: the text model's own, of text tokens only, and the state of the visible windows.

Shapes: B rows, S cached text tokens, Hkv key heads, D channels of a head.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from casa.errors import UserError
from casa.layers import WindowState
from casa.models.insertion import StreamState
from casa.models.text_cache import TextCache


class CasaCache(Cache):
    """What a later call needs of earlier ones.

    text: the cache that the text model fills; under insertion it holds image tokens too.
    windows: the CASA layers' state, or None while no image has been seen.
    stream: insertion only, what is cached of the merged stream of text and images.
    """

    def __init__(self, config: Any = None, replaced: Iterable[int] = ()) -> None:
        self.text = TextCache(config, replaced)
        super().__init__(layers=self.text.layers)
        self.windows: WindowState | None = None
        self.stream: StreamState | None = None
        self.num_text = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Text tokens cached, padding included: what `attention_mask` and positions count."""
        return self.num_text

    @property
    def slides(self) -> bool:
        """Whether some blocks keep the newest text only (sliding-window attention)."""
        return any(getattr(layer, "is_sliding", False) for layer in self.text.layers)

    @property
    def image_tokens(self) -> int:
        """Image tokens held, over all rows: of visible windows, or under insertion of the whole past."""
        if self.stream is not None:
            return int(self.stream.images.sum())
        return sum(self.windows.image_tokens) if self.windows is not None else 0

    @property
    def text_bytes(self) -> int:
        """Bytes of the text model's cache."""
        return sum(t.numel() * t.element_size() for t in self._text_tensors())

    @property
    def image_bytes(self) -> int:
        """Bytes of the visible windows' image keys and values; 0 under insertion, where the text cache has them."""
        return self.windows.image_bytes if self.windows is not None else 0

    @property
    def num_bytes(self) -> int:
        """All bytes held: text cache, images and text of the visible windows."""
        return self.text_bytes + (self.windows.image_bytes + self.windows.text_bytes if self.windows else 0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory behind the cache: `num_bytes`, room for text to come, and all that nobody reads.

        Memory that several tensors share counts once.
        """
        tensors = self._text_tensors()
        if self.windows is not None:
            tensors += [t for layer in self.windows.layers for t in (layer.key, layer.value)]
        if self.stream is not None:
            tensors += [self.stream.mask, self.stream.next_position, self.stream.images]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def twin(self) -> "CasaCache":
        """A cache to go on with while this one stays as it is, for the case that it is needed again. Copies no tensor.

        Only one of the two may be fed: both would write into the room behind the open window's text.
        """
        twin = copy.copy(self)
        twin.text = copy.copy(self.text)
        twin.layers = twin.text.layers = [copy.copy(layer) for layer in self.text.layers]
        twin.windows = self.windows.twin() if self.windows is not None else None
        return twin

    def _text_tensors(self) -> list[Tensor]:
        layers: list[Any] = self.text.layers
        return [t for layer in layers if getattr(layer, "keys", None) is not None for t in (layer.keys, layer.values)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.text.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.text.batch_repeat_interleave(repeats)
        rows = self.windows.num_rows if self.windows is not None else 0
        if self.stream is not None:
            rows = len(self.stream.images)
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.windows is not None:
            self.windows.select(rows)
        if self.stream is not None:
            self.stream = self.stream.select(rows)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back the last tokens."""
        return self.stream is None and super().is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens (a negative number of them), as far back as the last image."""
        count = -int(tokens_to_remove)
        if count < 0:
            raise UserError("crop takes the number of tokens to remove, as a negative number.")
        if count > self.num_text:
            raise UserError(f"cannot take back {count} tokens of {self.num_text}.")
        if self.windows is not None and any(row and row[-1].behind < count for row in self.windows.windows):
            raise UserError(f"cannot take back {count} tokens: an image stands among them.")
        if self.stream is not None and count:
            raise UserError("a cache of inserted images cannot be cropped; start a new one.")
        self.text.crop(tokens_to_remove)
        self.num_text -= count
        if self.windows is not None:
            self.windows.windows = [[*row[:-1], row[-1].longer(-count)] if row else row for row in self.windows.windows]

    def reset(self) -> None:
        self.text.reset()
        self.windows = self.stream = None
        self.num_text = 0

    def drop_text(self, first: int, count: int, turns: Sequence[Callable[[Tensor, int], Tensor]]) -> None:
        """Forgets `count` text tokens from `first` on; later ones move up, their rotary positions with them.

        turns: for each block, moves rotated keys (n, Hkv, D) by a number of positions. Windows keep their own text
            (`WindowState.forget_text` is theirs).
        Raises UserError for a cache of inserted images, or of blocks that see a sliding window only.
        """
        if self.stream is not None:
            raise UserError("text cannot be dropped from a cache of inserted images.")
        if not 0 <= first <= first + count <= self.num_text:
            raise UserError(f"cannot drop tokens {first}..{first + count} of {self.num_text}.")
        if self.slides:
            raise UserError("this model's cache slides already; text cannot be dropped from it, leave it unbounded.")
        layers: list[Any] = self.text.layers
        for layer, turn in zip(layers, turns, strict=False):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.numel() == 0:
                continue
            rows, _, length, _ = keys.shape
            rest = keys[:, :, first + count :].transpose(1, 2).flatten(0, 1)
            moved = turn(rest, -count).unflatten(0, (rows, length - first - count)).transpose(1, 2)
            layer.keys = torch.cat([keys[:, :, :first], moved], dim=2)
            layer.values = torch.cat([values[:, :, :first], values[:, :, first + count :]], dim=2)
        self.num_text -= count
