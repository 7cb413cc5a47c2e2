"""The insertion baseline: image tokens stand in the text stream, as most vision-language models have it.

Shapes: B rows, L text tokens of this call, S tokens of text and images of this call, N image tokens, d width.

    text            a b c d             image I of two tokens, one beside the other, before c
    stream          a b I I c d         every image token takes a cache slot and goes through every FFN
    positions       0 1 2 3 4 5         with one rotary axis
    time            0 1 2 2 4 5         with three (mRoPE): all of an image at one time, its tokens told apart by row
    row             0 1 2 2 4 5         and column, and text going on behind the longer side of the image
    column          0 1 2 3 4 5
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casa.layers import images_by_row


def last_real(mask: Tensor, counts: Tensor) -> Tensor:
    """Picks the last real tokens of each row.

    Args:
        mask: bool (B, S), True where a token is real.
        counts: int64 (B,), how many.

    Returns:
        bool (B, S).
    """
    return mask & (mask.flip(1).cumsum(1).flip(1) <= counts[:, None])


@dataclass(frozen=True)
class StreamState:
    """What later calls need to know of the stream so far.

    Attributes:
        mask: bool (B, S), True where a cached token is real.
        next_position: int64 (B, 1).
        images: int64 (B,), image tokens cached.
    """

    mask: Tensor
    next_position: Tensor
    images: Tensor

    def select(self, rows: Tensor) -> "StreamState":
        """Keeps, repeats or reorders rows; int64 (B',)."""
        rows = rows.to(self.mask.device)
        return StreamState(self.mask[rows], self.next_position[rows], self.images[rows])

    def without_last(self, counts: Tensor) -> "StreamState":
        """The last tokens of each row, int64 (B,), made padding; they are text, each of which took one position."""
        return StreamState(self.mask & ~last_real(self.mask, counts), self.next_position - counts[:, None], self.images)


@dataclass(frozen=True)
class Stream:
    """Where each token of the merged stream comes from.

    Attributes:
        source: int64 (B, S), index into [text (B * L); image tokens (N); one row of zeros].
        mask: bool (B, S), True where real.
        text_slot: int64 (B, L), where each text token went (padding: 0).
        starts: bool (B, S), True where a packed sample starts.
        advance: int64 (B, S), how many positions each token takes.
        offset: int64 (axes, B, S), where a token stands on each axis, counted from its position.
    """

    source: Tensor
    mask: Tensor
    text_slot: Tensor
    starts: Tensor
    advance: Tensor
    offset: Tensor

    def embeddings(self, text: Tensor, images: Tensor) -> Tensor:
        """(B, S, d) from text (B, L, d) and images (N, d)."""
        flat = text.flatten(0, 1)
        rows = torch.cat([flat, images.to(flat.dtype), torch.zeros_like(flat[:1])])
        return rows[self.source]

    def text_of(self, hidden: Tensor) -> Tensor:
        """(B, L, d) at text positions of (B, S, d)."""
        return hidden.gather(1, self.text_slot[..., None].expand(-1, -1, hidden.shape[-1]))

    def positions(self, past: StreamState | None) -> Tensor:
        """int64 (axes, B, S): where tokens stand, counted from 0, from 0 again at packed samples."""
        before = self.advance.cumsum(1) - self.advance
        start = torch.where(self.starts, before, torch.zeros_like(before)).cummax(1).values
        # padding behind a packed row stands still, which makes each of its tokens a sample that nobody looks at
        return (before - start + (0 if past is None else past.next_position)) + self.offset

    def after(self, past: StreamState | None) -> StreamState:
        """The state once this call's tokens are cached too."""
        images, position = self.is_image.sum(1), self.advance.sum(1, keepdim=True)
        if past is None:
            return StreamState(self.mask, position, images)
        mask = torch.cat([past.mask, self.mask], dim=1)
        return StreamState(mask, past.next_position + position, past.images + images)

    def ordinals(self) -> Tensor:
        """int64 (B, S): 0, 1, ... within each packed sample; padding behind them stays at one number."""
        count = self.mask.long().cumsum(1)
        start = torch.where(self.starts, count - 1, torch.zeros_like(count)).cummax(1).values
        return (count - 1 - start).clamp(min=0)

    @property
    def is_image(self) -> Tensor:
        """bool (B, S)"""
        text = self.text_slot.numel()
        return self.mask & (self.source >= text)


@torch.compiler.disable(reason="loops over rows and tokens")
def merge(
    valid: Tensor,
    image_places: Sequence[tuple[int, int]],
    image_lengths: Sequence[int],
    sample_starts: Sequence[Sequence[int]] | None = None,
    grids: Sequence[tuple[int, int]] | None = None,
) -> Stream:
    """Merges text and images of each row, padded on the left (packed rows on the right).

    Args:
        valid: bool (B, L).
        image_places: (row, index before which the image stands).
        grids: Rows and columns of each image, for rotary positions of three axes; None for one axis.

    Raises:
        UserError: As `plan_call` does.
    """
    real = [row.nonzero().flatten().tolist() for row in valid.cpu()]
    rows, length = valid.shape
    images = images_by_row(image_places, image_lengths, real, length)
    zero = rows * length + sum(image_lengths)
    offset = rows * length
    merged: list[list[int]] = []
    begins: list[list[int]] = []
    for row, tokens in enumerate(real):
        places, stream, opens = list(images[row]), [], []
        first = {0, *(sample_starts[row] if sample_starts is not None else ())}
        for number, index in enumerate([*tokens, -1]):
            if index in first or (number == 0 and index >= 0):
                opens.append(len(stream))
            while places and places[0][0] == number:
                count = places.pop(0)[1]
                stream += range(offset, offset + count)
                offset += count
            if index >= 0:
                stream.append(row * length + index)
        merged.append(stream)
        begins.append(opens)
    width = max(map(len, merged), default=0)
    source, mask, starts = [], [], []
    takes, stands = _steps(rows * length, image_lengths, grids)
    slots = torch.zeros(rows, length, dtype=torch.int64)
    for row, (stream, opens) in enumerate(zip(merged, begins, strict=True)):
        empty = width - len(stream)
        left = 0 if sample_starts is not None else empty
        right = empty - left
        source.append([zero] * left + stream + [zero] * right)
        mask.append([False] * left + [True] * len(stream) + [False] * right)
        starts.append([slot - left in opens for slot in range(width)])
        for slot, token in enumerate(stream):
            if token < rows * length:
                slots[row, token - row * length] = slot + left
    device = valid.device
    index = torch.tensor(source, dtype=torch.int64).reshape(rows, width)
    return Stream(
        index.to(device),
        torch.tensor(mask, dtype=torch.bool, device=device).reshape(rows, width),
        slots.to(device),
        torch.tensor(starts, dtype=torch.bool, device=device).reshape(rows, width),
        takes[index].to(device),
        stands[:, index].to(device),
    )


def _steps(text: int, lengths: Sequence[int], grids: Sequence[tuple[int, int]] | None) -> tuple[Tensor, Tensor]:
    """For every row of [text; images; zeros]: positions it takes (n,), and its offset on each axis (axes, n)."""
    takes = torch.ones(text + sum(lengths) + 1, dtype=torch.int64)
    takes[-1] = 0  # padding
    offset = torch.zeros(1 if grids is None else 3, len(takes), dtype=torch.int64)
    first = text
    for rows, columns in grids or ():
        stop = first + rows * columns
        takes[first:stop] = 0
        takes[stop - 1] = max(rows, columns)
        offset[1, first:stop] = torch.arange(rows).repeat_interleave(columns)
        offset[2, first:stop] = torch.arange(columns).repeat(rows)
        first = stop
    return takes, offset
