"""The cache of a CASA model: the text model's own, of text tokens only, and the state of the visible windows.

Shapes: B rows, S cached text tokens, n new ones, Hkv key heads, D channels of a head.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from casa.errors import UserError
from casa.layers import WindowState
from casa.models.insertion import StreamState, last_real
from casa.models.replay import Replays

# what transformers calls a cache, as an argument and in outputs, from 5.24 on and before
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def pop_cache(arguments: dict[str, Any]) -> Cache | None:
    """Takes the cache out of the arguments of a call, by whichever of its two names."""
    new, old = arguments.pop("cache", None), arguments.pop("past_key_values", None)
    return old if new is None else new


class GrowingLayer(DynamicLayer):
    """One block's keys and values, of which a new token copies only itself.

    transformers' own layer copies all it holds at every call: at 8,000 tokens that is most of the time of a token. This
    one leaves an eighth of the length free behind it, writes there, and copies when that is full. Whoever sets `keys`
    and `values` to other tensors may: the room is given up, and the next call makes it anew. With gradients on, or
    compiled, for keys and values of two shapes, or for tokens of another dtype, device or number of rows, it is
    transformers' own.
    """

    _keys: Tensor | None = None
    _values: Tensor | None = None
    # (2, B, Hkv, room, D), of which `keys` and `values` are the first S tokens; nobody else writes there
    _buffer: Tensor | None = None

    @property
    def keys(self) -> Any:
        return self._keys

    @keys.setter
    def keys(self, new: Any) -> None:
        self._keys, self._buffer = new, None

    @property
    def values(self) -> Any:
        return self._values

    @values.setter
    def values(self, new: Any) -> None:
        self._values, self._buffer = new, None

    def __copy__(self) -> "GrowingLayer":
        """The same keys and values. The copy takes the room along: of two that go on, one has to copy."""
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        self._buffer = None
        return found

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, Hkv, n, D) each; gives all keys and values, (B, Hkv, S + n, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        alike = _alike(self.keys, key_states) and _alike(self.values, value_states)
        # autograd wants what it saved unchanged, and a compiled graph tensors that it made itself
        kept = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if kept or not alike or key_states.shape != value_states.shape:
            return super().update(key_states, value_states, *args, **kwargs)
        return self._add((key_states, value_states))

    def add(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """As `update`, of keys and values (2, B, Hkv, n, D) with gradients off."""
        if (held := self._buffer) is None or held.shape[1:3] != new.shape[1:3] or held.dtype != new.dtype:
            return self.update(*new)
        return self._add(new)

    def _add(self, new: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        held, count = _length(self._keys), new[0].shape[2]
        buffer = self._room(held + count)
        if buffer is None:
            buffer = _begun((self._keys, self._values), new[0], held + count)
        room = buffer.narrow(3, held, count)
        if isinstance(new, Tensor):
            room.copy_(new)
        else:
            room[0], room[1] = new
        self._keys, self._values = buffer.narrow(3, 0, held + count).unbind()
        self._buffer = buffer
        return self._keys, self._values

    def reserve(self, count: int) -> Tensor:
        """The buffer (2, B, Hkv, room, D) with room for `count` more tokens, zeros behind those held."""
        held = _length(self._keys)
        buffer = self._room(held + count)
        if buffer is None:
            buffer = _begun((self._keys, self._values), cast(Tensor, self._keys), held + count)
            self._keys, self._values = buffer.narrow(3, 0, held).unbind()
            self._buffer = buffer
        buffer[:, :, :, held:] = 0
        return buffer

    def room_is(self, buffer: Tensor) -> bool:
        """Whether this is the buffer, and may be written."""
        return self._buffer is buffer and self._room(_length(self._keys) + 1) is not None

    def written(self, count: int) -> None:
        """Takes for its own so many tokens that were written into the room behind those held."""
        length = _length(self._keys) + count
        self._keys, self._values = cast(Tensor, self._buffer).narrow(3, 0, length).unbind()

    def _room(self, length: int) -> Tensor | None:
        """The buffer, if it has room for `length` tokens and may be written."""
        buffer = self._buffer
        if buffer is None or buffer.shape[3] < length:
            return None
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            return None
        # what was pickled has lost its buffer, and holds another
        return buffer if cast(Tensor, self._keys).data_ptr() == buffer.data_ptr() else None


def _length(held: Tensor | None) -> int:
    return held.shape[2] if held is not None and held.dim() == 4 else 0  # empty, it has one dimension


def _alike(held: Tensor, new: Tensor) -> bool:
    """Whether new tokens can stand behind those held, as they are."""
    if held.dim() < 4:
        return True
    same_shape = new.shape[:2] + new.shape[3:] == held.shape[:2] + held.shape[3:]
    return same_shape and (held.dtype, held.device) == (new.dtype, new.device)


def _begun(held: tuple[Tensor | None, Tensor | None], new: Tensor, length: int) -> Tensor:
    """A buffer for `length` tokens like `new` and an eighth more, which begins with those held."""
    rows, heads, _, width = new.shape
    buffer = new.new_empty(2, rows, heads, length + length // 8, width)
    for half, old in zip(buffer, held, strict=True):
        if old is not None and (count := _length(old)):
            half[:, :, :count] = old
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


@dataclass(frozen=True)
class Seen:
    """The images that a row has seen: how many, those of its last run, and how many cached text tokens stand before it
    (padding included).
    """

    images: int = 0
    run: int = 0
    column: int = 0

    def moved(self, columns: int) -> "Seen":
        """The same where `columns` more tokens of text stand before it."""
        return replace(self, column=self.column + columns)


class CasaCache(Cache):
    """What a later call needs of earlier ones.

    Attributes:
        text: The cache that the text model fills; under insertion it holds image tokens too.
        windows: The CASA layers' state, or None while no image has been seen.
        stream: Insertion only, what is cached of the merged stream of text and images.
        mask: bool (B, S), which cached text tokens are real; None if all are.
        seen: What each row has seen; empty while no row has seen an image.
        ids: int64 (B, S), the text that is cached, where `generate` knows it.
        searched: Whether beams have filled it, whose rows are not those of the answer.
        replays: On a GPU, its token as it was captured.
    """

    def __init__(self, config: Any = None, replaced: Iterable[int] = ()) -> None:
        self.text = TextCache(config, replaced)
        super().__init__(layers=self.text.layers)
        self.windows: WindowState | None = None
        self.stream: StreamState | None = None
        self.num_text = 0
        self.mask: Tensor | None = None
        self.seen: list[Seen] = []
        self.ids: Tensor | None = None
        self.searched = False
        self.replays = Replays()

    def take_over(self, given: DynamicCache) -> "CasaCache":
        """Makes an empty cache of transformers one of this model's, as it stands in its owner's hands."""
        vars(given).clear()
        given.__class__ = CasaCache  # type: ignore[assignment]
        vars(given).update(vars(self))
        return given  # type: ignore[return-value]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Text tokens cached, padding included: what `attention_mask` and positions count."""
        return self.num_text

    @property
    def num_rows(self) -> int:
        """B; 0 while it is empty."""
        layers: list[Any] = self.text.layers
        return next((len(layer.keys) for layer in layers if layer.is_initialized), 0)

    @property
    def known(self) -> Tensor:
        """bool (B, S), which cached text tokens are real."""
        return torch.ones(self.num_rows, self.num_text, dtype=torch.bool) if self.mask is None else self.mask

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
            tensors += [layer.seen for layer in self.windows.layers if layer.seen is not None]
        if self.stream is not None:
            tensors += [self.stream.mask, self.stream.next_position, self.stream.images]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def covering(self, mask: Tensor | None, length: int) -> Tensor | None:
        """The `attention_mask` of a call of `length` tokens that gives none: of a cache that holds padding."""
        if mask is not None or self.mask is None:
            return mask
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), length)], dim=1).long()

    def check_mask(self, mask: Tensor) -> None:
        """Compares what a call's mask (B, S and more) says of the cached text with what is known of it.

        The last tokens of a row may be hidden; they are forgotten (see `forget_last`).

        Raises:
            UserError: It says anything else. Windows have seen what is cached, and padding was seen by nobody.
        """
        said = mask[:, : self.num_text].bool()
        if self.mask is None and bool(said.all()):
            return
        known = self.known.to(said.device)
        if torch.equal(said, known):
            return
        if bool((said & ~known).any()):
            row = int((said & ~known).any(1).nonzero()[0])
            raise UserError(
                f"attention_mask shows tokens of row {row} that are padding in the cache (before its text, or behind "
                "the end of its answer); it must be 0 there."
            )
        counts = self.hidden_last(said)
        if counts is None:
            raise UserError(
                "attention_mask hides cached text that later text stands behind, which has seen it; begin a new cache."
            )
        self.forget_last(counts)

    def hidden_last(self, said: Tensor) -> Tensor | None:
        """int64 (B,), how many of each row's last tokens a mask (B, S) hides; None if it differs elsewhere too."""
        known = self.known.to(said.device)
        counts = (known & ~said).sum(1)
        return counts if torch.equal(said, known & ~last_real(known, counts)) else None

    def forget_last(self, counts: Tensor) -> None:
        """Makes the last real tokens of each row padding: int64 (B,), how many. None stays where a new one would be.

        Raises UserError if an image stands among them.
        """
        if not bool(counts.any()):
            return
        known = self.known.to(counts.device)
        hidden = last_real(known, counts)
        for row, count in enumerate(counts.tolist()):
            behind = known[row, self.seen[row].column :].sum() if self.seen else known[row].sum()
            if count > behind:
                raise UserError(f"cannot forget the last {count} tokens of row {row}: an image stands among them.")
        self._shorten(counts.tolist())
        if self.stream is not None:
            self.stream = self.stream.without_last(counts)
        self.mask = known & ~hidden

    def _shorten(self, counts: list[int]) -> None:
        """Takes the last tokens of each row out of its open window."""
        if self.windows is not None:
            self.windows.windows = [
                [*row[:-1], row[-1].longer(-count)] if row else row
                for row, count in zip(self.windows.windows, counts, strict=True)
            ]

    @torch.compiler.disable(reason="looks at the values of masks and places")
    def count(self, mask: Tensor | None, places: Sequence[tuple[int, int]], rows: int, length: int) -> None:
        """Notes a call's text and images, once all layers have run.

        Args:
            mask: (B, S + length), None if all is real.
            places: (row, index in this call's text before which it stands).
        """
        before = self.num_text
        self.num_text += length
        self.mask = None if mask is None or bool(mask.all()) else mask.bool()
        if places and not self.seen:
            self.seen = [Seen() for _ in range(rows)]
        for row, index in places:
            last, column = self.seen[row], before + index
            between = column - last.column if self.mask is None else int(self.mask[row, last.column : column].sum())
            self.seen[row] = Seen(last.images + 1, 1 if between else last.run + 1, column)

    def at_end(self, row: int) -> int:
        """How many images a row has seen that no text stands behind yet."""
        if not self.seen:
            return 0
        last = self.seen[row]
        return 0 if bool(self.known[row, last.column :].any()) else last.run

    def twin(self) -> "CasaCache":
        """A cache to go on with while this one stays as it is, for the case that it is needed again. Copies no tensor.

        Only one of the two may be fed: both would write into the room behind the open window's text.
        """
        twin = copy.copy(self)
        twin.text = copy.copy(self.text)
        twin.layers = twin.text.layers = [copy.copy(layer) for layer in self.text.layers]
        twin.windows = self.windows.twin() if self.windows is not None else None
        twin.seen, self.replays = list(self.seen), Replays()
        if self.windows is not None:
            twin.replays.lend(self.windows.layers)
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
        rows = self.num_rows
        self.text.batch_repeat_interleave(repeats)
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.windows is not None:
            self.windows.select(rows)
        if self.stream is not None:
            self.stream = self.stream.select(rows)
        if self.seen:
            self.seen = [self.seen[row] for row in rows.tolist()]
        for name in ("mask", "ids"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[rows.to(held.device)])

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
        kept = self.num_text - count
        real = self.known[:, kept:].sum(1).tolist()
        windows = self.windows.windows if self.windows is not None else []
        if any(row and row[-1].behind < own for row, own in zip(windows, real, strict=False)):
            raise UserError(f"cannot take back {count} tokens: an image stands among them.")
        if self.stream is not None and count:
            raise UserError("a cache of inserted images cannot be cropped; start a new one.")
        self.text.crop(tokens_to_remove)
        self._shorten(real)
        self.num_text = kept
        self.mask = None if self.mask is None else self.mask[:, :kept]
        self.ids = None if self.ids is None else self.ids[:, :kept]

    def reset(self) -> None:
        self.text.reset()
        self.windows = self.stream = self.mask = self.ids = None
        self.num_text, self.seen, self.searched = 0, [], False

    def drop_text(self, first: int, count: int, turns: Sequence[Callable[[Tensor, int], Tensor]]) -> None:
        """Forgets `count` text tokens from `first` on; later ones move up, their rotary positions with them.

        Args:
            turns: For each block, moves rotated keys (n, Hkv, D) by a number of positions. Windows keep their own text
                (`WindowState.forget_text` is theirs).

        Raises:
            UserError: The cache holds inserted images, or its blocks see a sliding window only.
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
        gone = slice(first, first + count)
        self.seen = [row.moved(-len(range(row.column)[gone])) for row in self.seen]
        if self.mask is not None:
            self.mask = torch.cat([self.mask[:, :first], self.mask[:, first + count :]], dim=1)
        self.ids = None
