"""From a padded batch to packed windows: which tokens are real, where images stand, what the state holds.

Shapes: B rows, L tokens of this call per row, Q real tokens of this call, T = Q and the text the state stands
for, N image tokens held or new. All index tensors are int64.

A call sees new tokens only. Text and images of earlier calls come from a `WindowState`; in the layout they
are `past` text (keys without queries) and images at the front of their windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from casa.errors import UserError
from casa.layers.state import WindowExtent, WindowState
from casa.windows import Window, WindowLayout

NOTHING = 0  # index of the row of zeros that stands for text of closed windows


@dataclass(frozen=True)
class Join:
    """How the state's keys and this call's keys become one packed stream.

    Attributes:
        text_slots, image_slots: (rows, slots), where the state holds the current windows' text and all images.
        text_order: (T,), index into [a row of zeros; the state's text; new text].
        image_order: (N,), index into [the state's images; new images].
    """

    text_slots: tuple[Tensor, Tensor]
    image_slots: tuple[Tensor, Tensor]
    text_order: Tensor
    image_order: Tensor


@dataclass(frozen=True)
class Keep:
    """What stays after a call: indices (B, I) and (B, W) into the packed images and text, and the extents."""

    image_index: Tensor
    text_index: Tensor
    windows: list[list[WindowExtent]]


@dataclass(frozen=True)
class CallPlan:
    """The geometry of one call. `tokens` (Q,) indexes the flattened (B * L) batch; None if every token is real.

    `new_images` (N',) indexes the packed images that are new in this call.
    """

    layout: WindowLayout
    tokens: Tensor | None
    new_images: Tensor
    join: Join | None
    keep: Keep | None


def plan_call(
    valid: Tensor,
    image_places: Sequence[tuple[int, int]],
    image_lengths: Sequence[int],
    *,
    split: str = "image",
    history: int = 0,
    sample_starts: Sequence[Sequence[int]] | None = None,
    state: WindowState | None = None,
    keep: bool = False,
    skip_blind: bool = False,
    device: torch.device | str = "cpu",
) -> CallPlan:
    """Plans a call over a batch.

    Args:
        valid: bool (B, L), True where a token is real.
        image_places: (row, index in the row before which the image stands) of each new image, in order.
        image_lengths: Image tokens of each.
        split: As for `WindowLayout`.
        history: As for `WindowLayout`.
        sample_starts: Per row, the indices at which packed samples start (None: a row is one sample).
        state: What earlier calls left; cannot be combined with packed samples.
        keep: Plan the next state too.
        skip_blind: Leave out text that sees no image, which is all text before a sample's first, and held windows that
            no new token looks at: where layers add nothing to such text, and split is "image".
        device: Of the index tensors.

    Returns:
        The plan.

    Raises:
        UserError: An image is out of range, out of order or inside padding.
    """
    if state is not None and sample_starts is not None:
        raise UserError("packed rows cannot continue a cache; pass one sample per row.")
    real = [row.nonzero().flatten().tolist() for row in valid.cpu()]
    length = valid.shape[1]
    images = images_by_row(image_places, image_lengths, real, length)
    past = [list(windows) for windows in state.windows] if state is not None else [[] for _ in real]
    skip_blind = skip_blind and split == "image"

    text_lengths: list[int] = []
    insertions: list[list[tuple[int, int]]] = []
    gone: list[int] = []
    is_new: list[bool] = []  # of each packed image token
    behind: list[int] = []  # per row, the text behind its last image, or all of the open window if that has none
    worked: list[list[int]] = []  # per row, the real tokens that are not left out
    for row, (places, tokens, starts) in enumerate(zip(images, real, sample_starts or [[0]] * len(real), strict=True)):
        unseen = past[row][-1].behind if past[row] else 0
        if skip_blind and places and _is_unseen(past[row], places[0][0], history):
            past[row] = []
        before, offset = [], 0
        for window in past[row]:
            if window.images:
                before.append((offset, window.images))
            offset += window.text
        borders = [*_count_before(tokens, starts), len(tokens)]
        worked.append([])
        for number, (first, stop) in enumerate(pairwise(borders)):
            # at the border of two samples an image belongs to the next one
            is_last = number == len(borders) - 2
            mine = [(p, n) for p, n in places if first <= p < stop or (is_last and p == stop)]
            if skip_blind and not before and (mine or not keep):
                first = mine[0][0] if mine else stop
            worked[row] += tokens[first:stop]
            text_lengths.append(offset + stop - first)
            insertions.append(before + [(offset + p - first, n) for p, n in mine])
            gone.append(offset)
        is_new += [False] * sum(n for _, n in before) + [True] * sum(n for _, n in places)
        behind.append(len(tokens) - places[-1][0] if places else unseen + len(tokens))
    if not any(past):
        state = None
    layout = WindowLayout.from_insertions(text_lengths, insertions, split, history, gone if state is not None else None)

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    padded = any(len(row) != length for row in worked)
    flat = [row * length + index for row, indices in enumerate(worked) for index in indices]
    return CallPlan(
        layout=layout,
        tokens=long(flat) if padded else None,
        new_images=long([index for index, new in enumerate(is_new) if new]),
        join=_join(state, past, images, worked, long) if state is not None else None,
        keep=_keep(layout, behind, history, long) if keep else None,
    )


def images_by_row(
    places: Sequence[tuple[int, int]], lengths: Sequence[int], real: list[list[int]], length: int
) -> list[list[tuple[int, int]]]:
    """Checks places of images and sorts them by row: (real tokens of the row before the image, its tokens)."""
    if len(places) != len(lengths):
        raise UserError(
            f"there are {len(lengths)} images but {len(places)} image_positions; give one position per image."
        )
    found: list[list[tuple[int, int]]] = [[] for _ in real]
    before = (0, 0)
    for number, ((row, index), tokens) in enumerate(zip(places, lengths, strict=True)):
        if not 0 <= row < len(real):
            raise UserError(f"image {number} stands in row {row}, but the batch has rows 0..{len(real) - 1}.")
        if not 0 <= index <= length:
            raise UserError(f"image {number} stands at index {index}, out of range 0..{length} of its row.")
        if (row, index) < before:
            raise UserError(f"image {number} is out of order; sort image_positions by row and index.")
        before = (row, index)
        inside = not real[row] or index < real[row][0] or index > real[row][-1] + 1
        if inside and not (index == length and not real[row]):
            raise UserError(f"image {number} stands at index {index} of row {row}, inside its padding.")
        found[row].append((_count_before(real[row], [index])[0], tokens))
    return found


def _count_before(real: list[int], indices: Sequence[int]) -> list[int]:
    """How many real tokens stand before each index of the row."""
    if len(real) == 0 or real[-1] - real[0] + 1 == len(real):  # one run of real tokens
        first = real[0] if real else 0
        return [min(max(index - first, 0), len(real)) for index in indices]
    return [sum(token < index for token in real) for index in indices]


def _is_unseen(held: Sequence[WindowExtent], text: int, history: int) -> bool:
    """Whether nobody looks at a row's held windows when an image comes behind `text` new tokens.

    The image opens a window unless it joins images that have no text behind them. Images alone are what is seen.
    """
    return not any(window.images for window in held) or (history == 0 and text == 0 and held[-1].text > 0)


def _join(
    state: WindowState,
    held: Sequence[Sequence[WindowExtent]],
    images: list[list[tuple[int, int]]],
    real: list[list[int]],
    long: Callable[[list[int]], Tensor],
) -> Join:
    held_text = [row[-1].text if row else 0 for row in held]
    held_images = [sum(window.images for window in row) for row in held]
    first_text = state.layers[0].images if state.layers else 0
    text_rows, text_slots, image_rows, image_slots = [], [], [], []
    for row, (text, image) in enumerate(zip(held_text, held_images, strict=True)):
        text_rows += [row] * text
        text_slots += range(first_text, first_text + text)
        image_rows += [row] * image
        image_slots += range(image)
    text_order, image_order = [], []
    old_text, new_text = 1, 1 + sum(held_text)  # after the row of zeros
    old_image, new_image = 0, sum(held_images)
    for row, windows in enumerate(held):
        text_order += [NOTHING] * sum(window.text for window in windows[:-1])
        text_order += range(old_text, old_text + held_text[row])
        text_order += range(new_text, new_text + len(real[row]))
        image_order += range(old_image, old_image + held_images[row])
        image_order += range(new_image, new_image + (added := sum(n for _, n in images[row])))
        old_text, new_text = old_text + held_text[row], new_text + len(real[row])
        old_image, new_image = old_image + held_images[row], new_image + added

    texts, pictures = (long(text_rows), long(text_slots)), (long(image_rows), long(image_slots))
    return Join(texts, pictures, long(text_order), long(image_order))


def _keep(layout: WindowLayout, behind: list[int], history: int, long: Callable[[list[int]], Tensor]) -> Keep:
    rows = len(behind)
    by_row: list[list[Window]] = [[] for _ in range(rows)]
    for window in layout.windows:
        by_row[window.sample].append(window)
    visible = [row if history == -1 else row[-(history + 1) :] for row in by_row]
    images = [list(range(row[0].image_start, row[-1].image_stop)) if row else [] for row in visible]
    text = [list(range(row[-1].text_start, row[-1].text_stop)) if row else [] for row in visible]

    def table(lists: list[list[int]]) -> Tensor:
        width = max((len(items) for items in lists), default=0)
        filled = [index for items in lists for index in items + [0] * (width - len(items))]
        return long(filled).reshape(rows, width)

    extents = [
        [WindowExtent(w.num_image, w.num_text, behind[number] if w is row[-1] else w.num_text) for w in row]
        for number, row in enumerate(visible)
    ]
    return Keep(table(images), table(text), extents)
