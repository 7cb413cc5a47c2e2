"""Caches of several sessions as the rows of one, and back: what lets sessions of any age share a forward pass.

Shapes: n sessions, S_i text tokens cached by session i, S the most of them, I_i its image slots, Hkv key heads, D
channels of a head. Text is padded on the left, as transformers has it:

    session 0    t t t t t t          row 0    t t t t t t
    session 1    t t                  row 1    . . . . t t

Images and text of the visible windows stand in slots of their own, filled from the front (`WindowState`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from casa.layers import LayerWindow, WindowState
from casa.models import CasaCache
from casa.models.cache import Seen
from casa.models.insertion import StreamState

ROOM = 16  # text slots kept free behind a window, so that the first tokens of a caption copy nothing


def join(caches: Sequence[CasaCache], empty: CasaCache) -> tuple[CasaCache, Tensor]:
    """One cache with a row per cache given (of one row each), and the mask (n, S) of its text, True where real.

    empty: a new cache of the same model, which is filled. The caches given are left as they are.
    """
    lengths = [cache.num_text for cache in caches]
    longest = max(lengths)
    mask = _mask(lengths, longest)
    empty.num_text, empty.mask = longest, None if mask.all() else mask
    if any(cache.seen for cache in caches):
        seen = [cache.seen[0] if cache.seen else Seen() for cache in caches]
        empty.seen = [one.moved(longest - length) for one, length in zip(seen, lengths, strict=True)]
    for index in range(max(len(cache.text.layers) for cache in caches)):
        rows = [_keys_and_values(cache, index) for cache in caches]
        if any(row is not None for row in rows):
            like = next(row for row in rows if row is not None)
            whole = [row if row is not None else tuple(x[:, :, :0] for x in like) for row in rows]
            width = max(row[0].shape[2] for row in whole)
            joined = [torch.cat([_left_padded(row[part], width) for row in whole]) for part in (0, 1)]
            empty.text.update(joined[0], joined[1], index)
    if all(cache.stream is not None for cache in caches):
        empty.stream = _joined_streams([cache.stream for cache in caches if cache.stream is not None])
    empty.windows = _joined_windows([cache.windows for cache in caches])
    return empty, mask


def part(cache: CasaCache, row: int, kept: Tensor, empty: CasaCache) -> CasaCache:
    """Row `row` of a joined cache as a cache of its own, filled into `empty`.

    kept: bool (tokens of text cached,), the slots that are this session's.
    """
    empty.num_text = int(kept.sum())
    if cache.seen:
        empty.seen = [cache.seen[row].moved(-int((~kept[: cache.seen[row].column]).sum()))]
    slots = kept
    if (stream := cache.stream) is not None:
        slots = stream.mask[row].nonzero().flatten()
        empty.stream = StreamState(
            torch.ones(1, len(slots), dtype=torch.bool, device=slots.device),
            stream.next_position[row : row + 1].clone(),
            stream.images[row : row + 1].clone(),
        )
    for index in range(len(cache.text.layers)):
        if (found := _keys_and_values(cache, index)) is not None:
            keys, values = (x[row : row + 1, :, slots.to(x.device)] for x in found)
            empty.text.update(keys, values, index)
    if cache.windows is not None:
        empty.windows = _part_of_windows(cache.windows, row)
    return empty


def _mask(lengths: Sequence[int], longest: int) -> Tensor:
    return torch.arange(longest) >= torch.tensor([longest - length for length in lengths])[:, None]


def _keys_and_values(cache: CasaCache, index: int) -> tuple[Tensor, Tensor] | None:
    if index >= len(cache.text.layers):
        return None
    layer = cache.text.layers[index]
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return None if keys is None or values is None or keys.dim() < 4 else (keys, values)


def _left_padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0))


def _joined_streams(streams: Sequence[StreamState]) -> StreamState:
    width = max(stream.mask.shape[1] for stream in streams)
    masks = [torch.nn.functional.pad(stream.mask, (width - stream.mask.shape[1], 0)) for stream in streams]
    return StreamState(
        torch.cat(masks),
        torch.cat([stream.next_position for stream in streams]),
        torch.cat([stream.images for stream in streams]),
    )


def _joined_windows(states: Sequence[WindowState | None]) -> WindowState | None:
    """A session that has seen no image yet has no window; its row is empty."""
    given = [state for state in states if state is not None]
    if not given:
        return None
    windows = [list(state.windows[0]) if state is not None else [] for state in states]
    layers = []
    for index in range(len(given[0].layers)):
        rows = [state.layers[index] if state is not None else None for state in states]
        like = next(row for row in rows if row is not None)
        images = max(sum(w.images for w in row) for row in windows)
        text = max((row[-1].text for row in windows if row), default=0)
        holds_text = any(row is not None and row.capacity > 0 for row in rows)
        shape = (len(rows), like.key.shape[1], images + (text + ROOM if holds_text else 0), like.key.shape[3])
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
    own = sum(window.images for window in extents)
    said = extents[-1].text if extents else 0
    layers = []
    for layer in state.layers:
        stop = min(said + ROOM, layer.capacity)
        pieces = [
            torch.cat([x[row : row + 1, :, :own], x[row : row + 1, :, layer.images : layer.images + stop]], dim=2)
            for x in (layer.key, layer.value)
        ]
        layers.append(LayerWindow(pieces[0], pieces[1], own))
    return WindowState([extents], layers)
