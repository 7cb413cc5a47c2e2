"""The insertion baseline: image tokens stand in the text stream, as most vision-language models have it.

Shapes: B rows, L text tokens of this call, S tokens of text and images of this call, N image tokens, d width.

    text            a b c d             image I of two tokens before c
    stream          a b I I c d         every image token takes a position, a cache slot and every FFN
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casa.layers import images_by_row


@dataclass(frozen=True)
class Stream:
    """Where each token of the merged stream comes from.

    source: int64 (B, S), index into [text (B * L); image tokens (N); one row of zeros].
    mask: bool (B, S), True where real. text_slot: int64 (B, L), where each text token went (padding: 0).
    starts: bool (B, S), True where a packed sample starts.
    """

    source: Tensor
    mask: Tensor
    text_slot: Tensor
    starts: Tensor

    def embeddings(self, text: Tensor, images: Tensor) -> Tensor:
        """(B, S, d) from text (B, L, d) and images (N, d)."""
        flat = text.flatten(0, 1)
        rows = torch.cat([flat, images.to(flat.dtype), torch.zeros_like(flat[:1])])
        return rows[self.source]

    def text_of(self, hidden: Tensor) -> Tensor:
        """(B, L, d) at text positions of (B, S, d)."""
        return hidden.gather(1, self.text_slot[..., None].expand(-1, -1, hidden.shape[-1]))

    def positions(self, past: Tensor | None) -> Tensor:
        """int64 (B, S): 0, 1, ... over real tokens of the row, from 0 again at packed samples.

        past: bool (B, S'), the mask of what is cached.
        """
        count = self.mask.long().cumsum(1)
        before = torch.where(self.starts, count - 1, torch.zeros_like(count)).cummax(1).values
        seen = past.sum(1, keepdim=True) if past is not None else 0
        # padding behind a packed row counts on as a sample of its own, which nobody looks at
        return (count - 1 - before + seen).clamp(min=0)


def merge(
    valid: Tensor,
    image_places: Sequence[tuple[int, int]],
    image_lengths: Sequence[int],
    sample_starts: Sequence[Sequence[int]] | None = None,
) -> Stream:
    """Merges text and images of each row, padded on the left (packed rows on the right).

    valid: bool (B, L). image_places: (row, index before which the image stands). Raises UserError as
    `plan_call` does.
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
    return Stream(
        torch.tensor(source, device=device).reshape(rows, width),
        torch.tensor(mask, device=device).reshape(rows, width),
        slots.to(device),
        torch.tensor(starts, device=device).reshape(rows, width),
    )
