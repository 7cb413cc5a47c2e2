"""The text model's own cache: keys and values of the blocks' self-attention, with room for the text to come.

Shapes: B rows, S cached tokens, n new ones, Hkv key heads, D channels of a head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """One block's keys and values, of which a new token copies only itself.

    transformers' own layer copies all it holds at every call: at 8,000 tokens that is most of the time of a token. This
    one leaves an eighth of the length free behind it, writes there, and copies when that is full. Whoever sets `keys`
    and `values` to other tensors may: the room is given up, and the next call makes it anew. With gradients on, or
    compiled, or for tokens of another dtype, device or number of rows, it is transformers' own.
    """

    _keys: Tensor | None = None
    _values: Tensor | None = None
    # (B, Hkv, room, D) each, of which `keys` and `values` are the first S tokens; nobody else writes there
    _buffers: tuple[Tensor, Tensor] | None = None

    @property
    def keys(self) -> Any:
        return self._keys

    @keys.setter
    def keys(self, new: Any) -> None:
        self._keys, self._buffers = new, None

    @property
    def values(self) -> Any:
        return self._values

    @values.setter
    def values(self, new: Any) -> None:
        self._values, self._buffers = new, None

    def __copy__(self) -> "GrowingLayer":
        """The same keys and values. The copy takes the room along: of two that go on, one has to copy."""
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        self._buffers = None
        return found

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, Hkv, n, D) each; gives all keys and values, (B, Hkv, S + n, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        alike = _alike(self.keys, key_states) and _alike(self.values, value_states)
        # autograd wants what it saved unchanged, and a compiled graph tensors that it made itself
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not alike:
            return super().update(key_states, value_states, *args, **kwargs)
        held = _length(self.keys)
        length = held + key_states.shape[2]
        buffers = self._room(length)
        if buffers is None:
            buffers = _begun(self.keys, key_states, length), _begun(self.values, value_states, length)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)
        self._buffers = buffers
        return self.keys, self.values

    def _room(self, length: int) -> tuple[Tensor, Tensor] | None:
        """The buffers, if they have room for `length` tokens and may be written."""
        if self._buffers is None or self._buffers[0].shape[2] < length:
            return None
        if self._buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return None
        # what was pickled has lost its buffers, and holds others
        same = (
            self.keys.data_ptr() == self._buffers[0].data_ptr()
            and self.values.data_ptr() == self._buffers[1].data_ptr()
        )
        return self._buffers if same else None


def _length(held: Tensor) -> int:
    return held.shape[2] if held.dim() == 4 else 0  # empty, it has one dimension


def _alike(held: Tensor, new: Tensor) -> bool:
    """Whether new tokens can stand behind those held, as they are."""
    if held.dim() < 4:
        return True
    rows, heads, _, width = held.shape
    return (held.dtype, held.device) == (new.dtype, new.device) and new.shape[:2] + new.shape[3:] == (
        rows,
        heads,
        width,
    )


def _begun(held: Tensor, new: Tensor, length: int) -> Tensor:
    """A buffer for `length` tokens and an eighth more, which begins with those held."""
    rows, heads, _, width = new.shape
    buffer = new.new_empty(rows, heads, length + length // 8, width)
    if _length(held):
        buffer[:, :, : held.shape[2]] = held
    return buffer


class TextCache(DynamicCache):
    """Keys and values of the blocks' self-attention. `replaced`: the blocks that have none.

    Masks and positions are made once for all blocks that see the whole text and once for all that see a sliding
    window, from the cache of the first block of each kind. Where that one is empty for ever, the next of its kind
    that is not stands in.
    """

    def __init__(self, config: Any = None, replaced: Iterable[int] = ()) -> None:
        super().__init__(config=config)
        self.replaced = frozenset(replaced)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer

    def _counting(self, layer_idx: int) -> int:
        """The block that knows what block `layer_idx` would hold."""
        if layer_idx not in self.replaced or layer_idx >= len(self.layers):
            return layer_idx
        kept = [index for index in range(len(self.layers)) if index not in self.replaced]
        slides = [getattr(layer, "is_sliding", False) for layer in self.layers]
        alike = [index for index in kept if slides[index] == slides[layer_idx]]
        # with none of its kind left nobody uses the mask
        return next(iter([*alike, *kept]), layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layer_idx = self._counting(layer_idx)
        layers: list[Any] = self.layers
        return layers[layer_idx].get_seq_length() if layer_idx < len(layers) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._counting(layer_idx))

    def reset(self) -> None:
        for layer in self.layers:
            # transformers before 5.18 fills what is held with zeros and goes on counting them
            layer.keys = layer.values = None  # type: ignore[union-attr]
            layer.is_initialized = False  # type: ignore[union-attr]
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        for index, layer in enumerate(self.layers):
            # one that slides cannot be cropped while it is empty
            if index not in self.replaced:
                layer.crop(tokens_to_remove)  # type: ignore[union-attr]
