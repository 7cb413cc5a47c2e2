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
    and `values` to other tensors may: they are taken over, by one copy, at the next call.
    """

    # (B, Hkv, room, D) each; `keys` and `values` are their first S tokens
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, Hkv, n, D) each; gives all keys and values, (B, Hkv, S + n, D)."""
        # autograd wants what it saved unchanged, and a compiled graph tensors that it made itself
        known = (key_states, value_states, self.keys, self.values)
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in known)
        if recorded or torch.compiler.is_compiling():
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys  # empty, of one dimension, at first
        values: Any = self.values
        held = keys.shape[2] if keys.dim() == 4 else 0
        length = held + key_states.shape[2]
        buffers = self._room(keys, values, length)
        if buffers is None:
            buffers = _begun(keys, key_states, length), _begun(values, value_states, length)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:length] = new
        self._buffers = buffers
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)
        return self.keys, self.values

    def _room(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
        """The buffers, if they begin with these keys and values, have room for `length`, and may be written."""
        if self._buffers is None or self._buffers[0].shape[2] < length:
            return None
        if self._buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return None
        same = _begins(self._buffers[0], keys) and _begins(self._buffers[1], values)
        return self._buffers if same else None


def _begins(buffer: Tensor, held: Tensor) -> bool:
    """Whether `held` is the first tokens of `buffer`, all its rows."""
    rows, heads, _, width = buffer.shape
    return (
        held.data_ptr() == buffer.data_ptr()
        and held.stride() == buffer.stride()
        and (held.shape[0], held.shape[1], held.shape[3]) == (rows, heads, width)
    )


def _begun(held: Tensor, like: Tensor, length: int) -> Tensor:
    """A buffer for `length` tokens and an eighth more, which begins with those held."""
    rows, heads, _, width = like.shape
    buffer = like.new_empty(rows, heads, length + length // 8, width)
    if held.dim() == 4:
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
